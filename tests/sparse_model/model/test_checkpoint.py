"""Model folders: every bit comes back, small when sparse, one clear error when damaged, never half-written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.reference import random_model

from sparse_model.config import SparseConfig, SparsityConfig
from sparse_model.io.atomic import clean_up, recover_folder, replace_folder
from sparse_model.model.checkpoint import load_sparse, save_sparse
from sparse_model.model.transformer import SparseTransformer
from sparse_model.model.weight_files import WEIGHTS
from sparse_model.sparsity.projection import project_

SMALL = SparseConfig(n_layers=1, d_model=32, d_mlp=48, n_heads=2, d_head=8, n_ctx=8, d_vocab=40)
CONFIGS = {
    "learned bigram": SMALL,
    "fixed bigram, sink": replace(SMALL, bigram="fixed", sink=True),
    "no bigram": replace(SMALL, bigram="none"),
    "tied": replace(SMALL, tied=True),
    "tied, no bias, learned positions": replace(SMALL, tied=True, bias=False, positions="learned"),
    "concat sinusoidal": replace(SMALL, positions="concat_sinusoidal", d_pos=4),
}


def sparse_model(cfg: SparseConfig, fraction: float = 1 / 16) -> SparseTransformer:
    model = random_model(cfg, dtype=torch.float32)
    project_(model.sparse_parameters(fraction), SparsityConfig(min_per_neuron=1))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved sparse model."""
    save_sparse(sparse_model(SMALL), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("compress", [True, False])
def test_saving_and_loading_restores_every_bit(cfg: SparseConfig, compress: bool, tmp_path: Path) -> None:
    model = sparse_model(cfg)
    with torch.no_grad():
        for p in (model.token_embed.weight, model.blocks[0].mlp.fc.weight):
            p.view(-1)[:6] = torch.tensor([-0.0, 0.0, float("inf"), -1e-45, 1e-45, float("nan")])
    save_sparse(model, tmp_path / "model", compress=compress)
    loaded = load_sparse(tmp_path / "model")
    assert loaded.cfg == cfg
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, t in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].view(torch.int32), t.view(torch.int32)), name
    assert (loaded.unembedding.weight is loaded.token_embed.weight) == cfg.tied
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_loaded_model_computes_the_same(folder: Path) -> None:
    tokens = torch.randint(SMALL.d_vocab, (2, 8))
    assert torch.equal(load_sparse(folder)(tokens), sparse_model(SMALL)(tokens))


def test_a_sparse_model_is_at_most_a_twentieth_of_a_dense_one(tmp_path: Path) -> None:
    cfg = SparseConfig(n_layers=1, d_model=512, d_mlp=2048, n_heads=32, bigram="none")
    model = SparseTransformer(cfg)
    save_sparse(model, tmp_path / "dense")
    project_(model.sparse_parameters(1 / 64), SparsityConfig())
    save_sparse(model, tmp_path / "sparse")
    dense, sparse = ((tmp_path / n / WEIGHTS).stat().st_size for n in ("dense", "sparse"))
    assert dense > 3_000_000 * 4
    assert sparse * 20 <= dense


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


FC = "blocks.0.mlp.fc.weight"


def test_the_fixture_is_packed(folder: Path) -> None:
    assert {f"{FC}.values", f"{FC}.indices", "bigram"} <= set(load_file(folder / WEIGHTS))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("bigram"), "missing bigram"),
        (lambda t: [t.pop(f"{FC}.values"), t.pop(f"{FC}.indices")], f"missing {FC}"),
        (lambda t: t.pop(f"{FC}.indices"), FC),
        (lambda t: t.pop(f"{FC}.values"), FC),
        (lambda t: t.update(extra=torch.zeros(2)), "unknown extra"),
        (lambda t: t.update({"extra.values": torch.zeros(2), "extra.indices": torch.zeros(2).int()}), "extra"),
        (lambda t: t.update(bigram=torch.zeros(3, 4)), r"bigram has shape \(3, 4\) instead of \(40, 40\)"),
        (lambda t: t[f"{FC}.indices"].fill_(48 * 32), f"indices of {FC}"),
        (lambda t: t[f"{FC}.indices"].fill_(-1), f"indices of {FC}"),
        (lambda t: t.update({f"{FC}.indices": t[f"{FC}.indices"][:-1].clone()}), f"indices of {FC}"),
    ],
    ids=[
        "missing",
        "missing packed",
        "no indices",
        "no values",
        "unknown",
        "unknown packed",
        "misshaped",
        "index too large",
        "negative index",
        "too few indices",
    ],
)
def test_tensors_that_do_not_fit_are_one_error_naming_file_and_tensor(folder: Path, change, named: str) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=named) as error:
        load_sparse(folder)
    assert str(folder / WEIGHTS) in str(error.value)


def test_a_tied_model_without_its_embedding_is_the_same_error(tmp_path: Path) -> None:
    save_sparse(random_model(CONFIGS["tied"], dtype=torch.float32), tmp_path / "m", compress=False)
    edit(tmp_path / "m", lambda t: t.pop("token_embed.weight"))
    with pytest.raises(ValueError, match=r"model\.safetensors.*missing token_embed"):
        load_sparse(tmp_path / "m")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_a_truncated_file_is_an_error_that_names_it(folder: Path, keep: float) -> None:
    path = folder / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError, match="damaged or truncated") as error:
        load_sparse(folder)
    assert str(path) in str(error.value)


def test_a_garbage_file_is_an_error_that_names_it(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(bytes(range(256)) * 40)
    with pytest.raises(ValueError, match="damaged or truncated") as error:
        load_sparse(folder)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_an_error_that_names_it(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_sparse(folder)
    assert str(folder / name) in str(error.value)


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_sparse(tmp_path / "nowhere")


# --- files ---


def content(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    target = tmp_path / "deep" / "target"
    with replace_folder(target) as temporary:
        (temporary / "a").write_text("old")
    return target


def test_a_replaced_folder_holds_only_the_new_files(target: Path) -> None:
    assert content(target) == {"a": "old"}
    with replace_folder(target) as temporary:
        assert list(temporary.iterdir()) == []
        (temporary / "b").write_text("new")
        assert content(target) == {"a": "old"}
    assert content(target) == {"b": "new"}
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_content_and_nothing_else(target: Path, failure: type) -> None:
    def write() -> None:
        with replace_folder(target) as temporary:
            (temporary / "b").write_text("half")
            raise failure

    with pytest.raises(failure):
        write()
    assert content(target) == {"a": "old"}
    assert list(target.parent.iterdir()) == [target]


def kill_at_rename(n: int, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the folder, but stop before the n-th rename as a kill would."""
    rename, calls = Path.rename, []

    def counted(self: Path, to: Path) -> Path:
        calls.append(to)
        if len(calls) == n:
            raise SystemExit
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted)
        with pytest.raises(SystemExit), replace_folder(target) as temporary:
            (temporary / "b").write_text("new")


@pytest.mark.parametrize("n", [1, 2])
def test_after_a_kill_between_the_renames_the_old_content_is_recovered(
    n: int, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at_rename(n, target, monkeypatch)
    assert target.exists() == (n == 1)
    recover_folder(target)
    assert content(target) == {"a": "old"}


def test_the_next_write_after_a_kill_keeps_the_old_content_until_it_succeeds(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at_rename(2, target, monkeypatch)

    def fail() -> None:
        with replace_folder(target):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert content(target) == {"a": "old"}
    with replace_folder(target) as temporary:
        (temporary / "c").write_text("newer")
    assert content(target) == {"c": "newer"}
    assert list(target.parent.iterdir()) == [target]


def test_leftovers_of_a_killed_run_are_cleaned(target: Path) -> None:
    mine, run = target.parent / ".target.mine.tmp", target / "run"
    mine.write_text("not ours")
    run.mkdir()
    other = run / ".weights.00000000.sb-new"  # a run of its own, whose writer it is
    for path in (other, run / ".lock", target / ".a.01234567.sb-new"):
        path.write_text("half")
    for name in (".target.89abcdef.sb-new", ".target.89abcdef.sb-old"):
        target.with_name(name).mkdir()
        (target.with_name(name) / "junk").write_text("junk")
    gone = target.with_name("gone")
    with replace_folder(gone) as temporary:
        (temporary / "c").write_text("kept")
    gone.rename(target.with_name(".gone.89abcdef.sb-old"))  # killed between the two renames
    clean_up(target.parent)
    assert {path.name for path in target.parent.iterdir()} == {"target", ".target.mine.tmp", "gone"}
    assert {path.name for path in target.iterdir()} == {"a", "run"}
    clean_up(target)
    assert other.exists()
    assert content(gone) == {"c": "kept"}


def test_recovering_what_needs_no_recovery_changes_nothing(target: Path) -> None:
    recover_folder(target)
    recover_folder(target.parent / "never existed")
    assert content(target) == {"a": "old"}
    assert list(target.parent.iterdir()) == [target]


def test_load_recovers_a_model_whose_replacement_was_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_sparse(folder).state_dict()
    kill_at_rename(2, folder, monkeypatch)
    after = load_sparse(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_failed_save_leaves_the_old_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    before = load_sparse(folder).state_dict()
    with monkeypatch.context() as patch:
        patch.setattr("sparse_model.model.weight_files.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            save_sparse(random_model(SMALL, seed=1, dtype=torch.float32), folder)
    after = load_sparse(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
