"""Loading a dense model so that what loads is that model: nothing missing, nothing left over, every number finite."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging
from typing_extensions import TypedDict

from bridges.dense import DenseModel
from bridges.families import refusal
from sparse_model.io.copied import check_copied
from sparse_model.io.local import local_path
from sparse_model.io.reading import read_json, read_typed
from sparse_model.io.tensors import Shape, read_shapes

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_FEW_LAYERS = 128
"""Takes no time to build without numbers, so that another check may say what is missing."""
_WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "a parallel wrapper"}
# Constants that earlier versions of transformers saved and later ones make anew.
_CONSTANTS = (".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq")


class _Index(TypedDict):
    """Which file holds which tensor of a model in several files."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012

    weight_map: dict[str, str]


def load_lm(name_or_folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model of a known family (`bridges.families`), from a local folder or by hub name.

    No code that comes with it is run. Raises FileNotFoundError for a path without a model, and ValueError for another
    kind of model, a name that cannot be fetched and everything by which what loads would be another model than the one
    in the files, each naming the file and the remedy.
    """
    config = read_config(name_or_folder)
    name, source = _name(name_or_folder), _weights(name_or_folder)
    _check_sizes(config, Path(source))
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in info, and refused below
            )
    except Exception as error:  # transformers, the hub client, safetensors and pickle raise many kinds
        raise ValueError(f"could not load a language model from {source}: {_first_line(error)}") from error
    model, info = loaded
    _check_info(info, model, source)
    _check_finite(model, source)
    if dtype == torch.float32:  # in others the sums are rounded elsewhere
        _check_sublayers(model, source)
    return model


def read_config(name_or_folder: str | Path) -> PretrainedConfig:
    """The config of a model that can be the dense one; raises as `load_lm`, without looking at its weights."""
    name = _name(name_or_folder)
    path = local_path(name_or_folder)
    if path is not None:
        if (path / "dense" / "config.json").is_file():
            raise FileNotFoundError(f"{path} is a run folder: name the dense model in it, {path / 'dense'}")
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"no model at {path}: the folder needs config.json and model.safetensors, as save_pretrained writes"
            )
        check_copied(path / "config.json")
        if not isinstance(read_json(path / "config.json", "copy it again", finite=False), dict):
            raise ValueError(f"{path / 'config.json'} is damaged (it holds no object): copy it again")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"could not load a language model from {name!r}: {_first_line(error)}") from error
    reason = refusal(config)
    if reason:
        raise ValueError(f"{name!r} {reason}")
    return config


def sample_tokens(d_vocab: int, n_ctx: int) -> Int[Tensor, "batch pos"]:
    """A few tokens, always the same, on which two views of one model are compared."""
    return torch.randint(d_vocab, (2, min(12, n_ctx)), generator=torch.Generator().manual_seed(0))


def _name(name_or_folder: str | Path) -> str:
    return str(local_path(name_or_folder) or name_or_folder)


def _weights(name_or_folder: str | Path) -> str:
    """The file that holds, or lists, the weights; the hub's name where there is no folder."""
    folder = local_path(name_or_folder)
    if folder is None:
        return repr(str(name_or_folder))
    found = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} holds no weights: it needs model.safetensors or pytorch_model.bin")
    check_copied(found[0])
    if found[0].suffix == ".json":
        for shard in _shards(found[0]):
            if not shard.is_file():
                raise FileNotFoundError(f"{shard} does not exist, but {found[0]} lists it: copy the shard there")
            check_copied(shard)
    return str(found[0])


def _shards(index: Path) -> list[Path]:
    listed = read_typed(_Index, index, "copy it again")["weight_map"]
    for name in listed.values():
        if Path(name).name != name:
            raise ValueError(f"{index} lists {name!r}, which is no file beside it: copy it again")
    return [index.parent / name for name in sorted(set(listed.values()))]


def _check_sizes(config: PretrainedConfig, source: Path) -> None:
    """Refuse sizes that are not those of the weights before anything as large is allocated.

    Only of safetensors files, whose header says the shapes; others hold at least what they say.
    """
    if not source.is_file() or source.suffix == ".bin" or source.name.endswith(".bin.index.json"):
        return
    stored: dict[str, Shape] = {}
    for path in _shards(source) if source.suffix == ".json" else [source]:
        stored |= read_shapes(path)
    layers = getattr(config, "num_hidden_layers", None)
    if type(layers) is not int or not 0 < layers <= max(len(stored), _FEW_LAYERS):
        raise ValueError(
            f"{source.parent / 'config.json'}: {layers!r} layers, but {source} holds {len(stored)} tensors: take both "
            "from the same model"
        )
    try:
        with torch.device("meta"), quiet():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise ValueError(
            f"could not make the model of {source.parent / 'config.json'}: {_first_line(error)}"
        ) from error
    for name, t in sorted(model.state_dict().items()):
        found = stored.get(name, stored.get(name.removeprefix(f"{model.base_model_prefix}."), tuple(t.shape)))
        if found != tuple(t.shape):
            raise _misfit(str(source), name, found, tuple(t.shape))


def _misfit(source: str, name: str, found: Any, wanted: Any) -> ValueError:
    return ValueError(
        f"{source} does not fit config.json: {name} has shape {tuple(found)} instead of {tuple(wanted)}; take both "
        "from the same model"
    )


def _check_info(info: dict[str, Any], model: PreTrainedModel, source: str) -> None:
    """Refuse what transformers only prints a table about."""
    kind = type(model).__name__
    unexpected = sorted(name for name in info["unexpected_keys"] if not name.endswith(_CONSTANTS))
    missing = sorted(info["missing_keys"])
    prefix = _prefix(unexpected, missing)
    if prefix:
        raise ValueError(
            f"{source}: the names of its tensors begin with {prefix!r}, which {_WRAPPERS.get(prefix, 'a wrapper')} "
            "puts before them, so that no weight would be found: take the prefix off, or save the model inside it"
        )
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise _misfit(source, name, found, wanted)
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of the tensors of a {kind} ({_few(missing)}), which would be random: copy "
            "the weights again, or save the whole model with save_pretrained"
        )
    if unexpected:
        raise ValueError(
            f"{source} holds {len(unexpected)} tensors that a {kind} of this config has no place for "
            f"({_few(unexpected)}): take weights and config.json from the same model"
        )


def _prefix(unexpected: list[str], missing: list[str]) -> str | None:
    """What stands before all names in a file, and before none of the model's."""
    if not unexpected:
        return None
    first = unexpected[0]
    found = (first.removesuffix(name) for name in missing if first.endswith(f".{name}"))
    return next((p for p in (*_WRAPPERS, *found) if all(name.startswith(p) for name in unexpected)), None)


def _check_finite(model: PreTrainedModel, source: str) -> None:
    for name, t in model.state_dict().items():
        if t.is_floating_point() and not bool(t.isfinite().all()):
            count = int((~t.isfinite()).sum())
            raise ValueError(
                f"{source}: {count} of the {t.numel()} values of {name} are not finite; take an earlier checkpoint of "
                "the model"
            )


@torch.no_grad()
def _check_sublayers(model: PreTrainedModel, source: str) -> None:
    """Refuse a model that computes something else than its family's row says."""
    dense = DenseModel(model)
    tokens = sample_tokens(dense.d_vocab, dense.n_ctx)
    check_same_logits(
        dense(tokens), model(tokens, use_cache=False).logits, f"{source}: the sublayers of this {type(model).__name__}"
    )


def check_same_logits(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Raise ValueError, saying by how much, where two views of one model differ by more than a share of the logits."""
    difference, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not difference <= tolerance * largest:
        raise ValueError(
            f"{what} give other logits than its Hugging Face model: they differ by up to {difference:.2g} where the "
            f"largest is {largest:.2g}, so that it would be bridged or steered as another model; give a model without "
            "options that change its attention or its residual stream"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own table of what is missing, which the errors say, and its bars; a download's is shown."""
    level, hook = logging.get_verbosity(), logging.set_tqdm_hook(_no_bar)
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.set_tqdm_hook(hook)


def _no_bar(bar: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return bar(*args, **options | {"disable": True})
