"""The study of bases, on the packaged bundle's dense model."""

from pathlib import Path

import pytest
from dense_start import Options, main


def test_the_chosen_basis_loses_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path))
    corpus = {"corpus": "generated", "corpus_tokens": 60_000}
    rows = main(Options(dense="demo", **corpus, topk=(0.25, 1.0), kept=(0.5,), eval_tokens=1024))  # type: ignore[arg-type]
    loss = {(name.split(",")[0], topk, kept): figure for name, topk, kept, figure in rows}
    assert loss["chosen", 0.25, 1.0] < min(loss["axes", 0.25, 1.0], loss["random turn", 0.25, 1.0])
    assert loss["chosen", 1.0, 0.5] < loss["random turn", 1.0, 0.5]
    whole = {figure for (_, topk, kept), figure in loss.items() if topk == kept == 1}
    assert max(whole) - min(whole) < 1e-4  # nothing is taken away: the dense model in any basis
