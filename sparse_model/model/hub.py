"""Model folders as people know them: `save_pretrained`, `from_pretrained`, `push_to_hub`, and a model card.

A folder holds what `sparse_model.model.weight_files` writes and a README.md made from `model_card.md.jinja`.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin

from sparse_model.config import SparseConfig
from sparse_model.io.hub import download
from sparse_model.io.local import local_path
from sparse_model.model.weight_files import read_model, write_files

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")

_DOWNLOAD = ("revision", "cache_dir", "force_download", "token", "local_files_only")


class HubModel(
    PyTorchModelHubMixin,
    model_card_template=_TEMPLATE,
    library_name="sparse-bridges",
    license="apache-2.0",
    pipeline_tag="text-generation",
    tags=["mechanistic-interpretability", "weight-sparse"],
):
    """What makes `SparseTransformer` a model of the Hugging Face hub."""

    cfg: SparseConfig
    measured: dict[str, Any]
    """Figures measured on this model, by name; they travel with it and stand in its card."""

    def save_pretrained(self, save_directory: str | Path, *, compress: bool = True, **kwargs: Any) -> str | None:
        """Write weights, config and model card into a folder; other files there stay.

        Sparse matrices are stored as their nonzeros, so that the folder is about as large as the model's L0;
        `compress=False` stores every tensor whole. Further arguments (`push_to_hub`, `repo_id`, ...) are those of
        `PyTorchModelHubMixin`. An existing README.md is kept.
        """
        self._compress = compress
        return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        state = self.state_dict()  # type: ignore[attr-defined]
        write_files(save_directory, self.cfg, state, self.measured, compress=getattr(self, "_compress", True))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """A model from a folder or by its name on the hub, with every weight bit for bit, in evaluation mode.

        Raises FileNotFoundError for a missing folder or file, OSError for a name that the hub does not know or cannot
        be asked for, ValueError for a damaged or truncated file or for tensors that do not fit the config.
        """
        name = str(pretrained_model_name_or_path)
        folder = local_path(pretrained_model_name_or_path)
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"{name} is not a folder: give one of save_pretrained() or a name on the hub")
        if folder is None:
            folder = download(name, **{k: kwargs.pop(k) for k in _DOWNLOAD if k in kwargs})
        return super().from_pretrained(str(folder), **kwargs)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", **kwargs: Any) -> Any:
        build: Any = cls  # the model that mixes this class in
        return read_model(build, Path(model_id)).to(map_location).eval()

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card: what the model is, how sparse, what was measured, how to load it, and where the method is from."""
        counts = self.sparse_parameters(1.0)  # type: ignore[attr-defined]
        return ModelCard.from_template(
            card_data=self._hub_mixin_info.model_card_data,
            template_str=self._hub_mixin_info.model_card_template,
            **{
                "cfg": self.cfg,
                "nonzeros": sum(int(p.tensor.count_nonzero()) for p in counts),
                "entries": sum(p.tensor.numel() for p in counts),
                "measured": self.measured,
                **kwargs,
            },
        )
