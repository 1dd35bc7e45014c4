"""save_pretrained, from_pretrained, push_to_hub and the model card, as users of the hub know them."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from support.reference import random_model

from sparse_model.config import SparseConfig, SparsityConfig
from sparse_model.model.checkpoint import load_sparse, save_sparse
from sparse_model.model.transformer import SparseTransformer
from sparse_model.sparsity.projection import project_

SMALL = SparseConfig(n_layers=1, d_model=128, d_mlp=128, n_heads=8, d_head=16, n_ctx=8, d_vocab=64, bigram="none")


@pytest.fixture
def model() -> SparseTransformer:
    model = random_model(SMALL, dtype=torch.float32)
    project_(model.sparse_parameters(1 / 64), SparsityConfig(min_per_neuron=1))
    model.measured = {"held-out cross-entropy, nats": 2.5, "corpus": "<script>generated</script>"}
    return model


def assert_equal(a: SparseTransformer, b: SparseTransformer) -> None:
    assert a.cfg == b.cfg
    assert a.measured == b.measured
    for name, t in a.state_dict().items():
        assert torch.equal(t, b.state_dict()[name]), name


@pytest.mark.parametrize("compress", [True, False])
def test_a_model_comes_back_bit_for_bit(model: SparseTransformer, compress: bool, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m", compress=compress)
    loaded = SparseTransformer.from_pretrained(tmp_path / "m")
    assert_equal(loaded, model)
    assert not loaded.training
    assert_equal(load_sparse(tmp_path / "m"), model)


def test_a_sparse_folder_is_a_twentieth_of_a_dense_one(model: SparseTransformer, tmp_path: Path) -> None:
    for compress in (True, False):
        model.save_pretrained(tmp_path / str(compress), compress=compress)
    sizes = {c: (tmp_path / str(c) / "model.safetensors").stat().st_size for c in (True, False)}
    assert (
        sizes[True] < sizes[False] / 15
    )  # headers and norms weigh at this size; tests/sparse_model/model/test_checkpoint.py has 1/20


def test_the_card_states_the_sparsity_and_what_was_measured(model: SparseTransformer, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    card = ModelCard.load(tmp_path / "m" / "README.md")
    nonzeros = sum(int(p.tensor.count_nonzero()) for p in model.sparse_parameters(1.0))
    assert f"{nonzeros:,} of" in card.text
    assert "| held-out cross-entropy, nats | 2.5 |" in card.text
    assert card.data.library_name == "sparse-bridges"


def test_other_files_and_an_edited_card_stay(model: SparseTransformer, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "README.md").read_text() == "mine"
    assert_equal(SparseTransformer.from_pretrained(tmp_path), model)


def test_a_later_save_without_figures_leaves_none_behind(model: SparseTransformer, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    model.measured = {}
    model.save_pretrained(tmp_path)
    assert SparseTransformer.from_pretrained(tmp_path).measured == {}


def test_pushing_uploads_what_from_pretrained_reads(
    model: SparseTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Url:
        repo_id = "someone/sparse"

    def upload(self, *, folder_path, **kwargs):
        assert_equal(SparseTransformer.from_pretrained(folder_path), model)
        (tmp_path / "card").write_text((Path(folder_path) / "README.md").read_text())

    monkeypatch.setattr(HfApi, "create_repo", lambda self, **kwargs: Url())
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    model.push_to_hub("someone/sparse", model_card_kwargs={"repo_id": "someone/sparse"})
    assert 'from_pretrained("someone/sparse")' in (tmp_path / "card").read_text()


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "no/such/folder", Path("nothing")])
def test_a_missing_folder_is_named(name: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(name)):
        SparseTransformer.from_pretrained(name)


def test_a_name_that_the_hub_cannot_be_asked_for_says_what_to_do() -> None:
    with pytest.raises(OSError, match=r"'someone/nothing'.*no local folder.*folder of save_pretrained"):
        SparseTransformer.from_pretrained("someone/nothing")


def test_a_damaged_folder_is_an_error(model: SparseTransformer, tmp_path: Path) -> None:
    save_sparse(model, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or truncated"):
        SparseTransformer.from_pretrained(tmp_path / "m")
