"""Every number of the training curves equals metrics.jsonl."""

import json

import numpy as np
import pytest
from support.report_page import Page
from support.report_runs import training_records

from bridges.run_folder import Run
from interventions.report.training import MOST_POINTS, history


def test_long_histories_are_thinned() -> None:
    past = history(training_records(5 * MOST_POINTS, 3))
    assert past.nmse_encode.shape == (MOST_POINTS, 3)
    assert past.step[0] == 3.0  # the mean of steps 1 .. 5


def test_histories_with_mixed_paths_alone() -> None:
    records = training_records(4, 3)
    for at, record in enumerate(records):
        del record["kl_dense_to_sparse"], record["kl_sparse_to_dense"]
        if at:
            record["kl_mixed"] = 2.0
    past = history(records)
    assert list(past.kl) == ["kl_mixed"]
    assert np.array_equal(past.kl["kl_mixed"], [np.nan, 2, 2, 2], equal_nan=True)


def test_every_curve_equals_the_records(full: Run, page: Page) -> None:
    records = [json.loads(line) for line in (full.folder / "metrics.jsonl").read_text().splitlines()]
    charts = {name: chart for name, chart in page.data["charts"].items() if name.startswith("training-")}
    assert list(charts) == ["training-terms", "training-encode", "training-decode", "training-kept", "training-rate"]
    drawn = {name: {one["name"]: one["values"] for one in chart["series"]} for name, chart in charts.items()}
    for chart in charts.values():
        assert chart["x"] == [record["step"] for record in records]

    def column(name: str) -> list:
        return pytest.approx([record[name] for record in records], rel=1e-3)

    def mean(name: str) -> list:
        return pytest.approx([sum(record[name]) / len(record[name]) for record in records], rel=1e-3)

    assert drawn["training-terms"] == {
        "sparse cross-entropy": column("ce"),
        "NMSE encoders": mean("nmse_encode"),
        "NMSE decoders": mean("nmse_decode"),
        "KL dense → sparse": column("kl_dense_to_sparse"),
        "KL sparse → dense": column("kl_sparse_to_dense"),
    }
    for way in ("encode", "decode"):
        assert drawn[f"training-{way}"] == {
            label: pytest.approx([record[f"nmse_{way}"][site] for record in records], rel=1e-3)
            for site, label in enumerate(("attn.0", "mlp.0", "attn.1", "mlp.1", "unembed"))
        }
    assert drawn["training-kept"] == {"share kept": column("nonzero_fraction")}
    assert drawn["training-rate"] == {"rate": column("lr")}
