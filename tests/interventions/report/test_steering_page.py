"""Every number of the page on steering equals metrics.json: curves, side effects, tables."""

import json
from pathlib import Path

import pytest
from support.report_page import Page, page_of
from support.report_runs import TASK, steering

from bridges.run_folder import Run, update_metrics
from interventions.report.page import write_report
from interventions.steering.result import Steering

ORDER = ("random_p05", "random_mean", "random_p95")


@pytest.fixture(scope="session")
def saved(full: Run) -> dict:
    return json.loads((full.folder / "metrics.json").read_text())["steering"][TASK]


def cells(curve: list[float]) -> list[str]:
    return [format(p, ".4f") for p in curve]


def test_the_chart(saved: dict, page: Page) -> None:
    chart = page.data["charts"]["steering-1"]
    assert chart["x"] == [0, 0.5, 1, 1.5]
    (band,) = chart["bands"]
    assert band["name"] == "5 random directions, 5–95 %"
    assert (band["low"], band["high"]) == (saved["random_p05"], saved["random_p95"])
    assert {series["name"]: series["values"] for series in chart["series"]} == {
        "1 channel": saved["channels"]["1"],
        "2 channels": saved["channels"]["2"],
        "2 channels in the paper's units": saved["paper"]["2"],
        "ridge regression, 2 channels": saved["ridge"]["2"],
        "exact patch": saved["exact_patch"],
        "difference of means": saved["difference_of_means"],
        "random directions, mean": saved["random_mean"],
        "random channels, 95th percentile": saved["random_channels_p95"],
        "shuffled decoder, 95th percentile": saved["shuffled_p95"],
        "untrained bridge, 95th percentile": saved["untrained_p95"],
    }
    ends = {series["name"]: (series["low"], series["high"]) for series in chart["series"] if series["low"]}
    assert ends == {
        "1 channel": ([0.01, 0.08, 0.15, 0.17], [0.01, 0.12, 0.25, 0.63]),
        "2 channels": ([0.01, 0.25, 0.6543, 0.18], [0.01, 0.35, 0.7654, 0.43]),
    }
    assert chart["caption"].startswith("Mean over 8 evaluation prompts; site 1, where=read.")
    assert "as long as the edit with 2 channels" in chart["caption"]


def test_the_unsteered_model_and_the_regression(page: Page) -> None:
    words = " ".join(page.words["steering"].split())
    assert "both prompts of 97 % of the pairs: P(right) 0.9100, P(wrong) 0.0200." in words
    assert "trained decoder 0.222, ridge regression 0.111." in words


def test_side_effects(page: Page) -> None:
    _, unsteered, steered = page.tables["side-effects"]
    figures = ["0.50", "0.6000", "0.0321", "4.50", "5.50"]
    assert steered == ["2 channels", *figures, "0.500", "for_while 0.25"]
    assert unsteered == ["unsteered", *figures, "–", "none solved"]


def test_all_numbers(saved: dict, page: Page) -> None:
    _, searched, curves, two_way, sets, norms = page.sections["steering"]
    assert searched[1:] == [["shuffled decoder", "1", "0.4200", "0.2000", "0.6000", "3", "0.500"]]
    assert curves[0] == ["strength", "0", "0.5", "1", "1.5"]
    named = {row[0]: row[1:] for row in curves[1:]}
    assert len(named) == len(curves) - 1
    wanted = {f"{n} channel{'s' * (n != '1')}": saved["channels"][n] for n in ("1", "2")}
    wanted |= {f"ridge regression, {n} channel{'s' * (n != '1')}": saved["ridge"][n] for n in ("1", "2")}
    wanted |= {f"{n} channel{'s' * (n != '1')} in the paper's units": saved["paper"][n] for n in ("1", "2")}
    wanted["1 channel from the sparse model alone"] = saved["by_patching"]["1"]
    wanted |= {"exact patch": saved["exact_patch"], "difference of means": saved["difference_of_means"]}
    kinds = {
        "random": "random directions",
        "random_channels": "random channels",
        "shuffled": "shuffled decoder",
        "untrained": "untrained bridge",
    }
    for field, name in kinds.items():
        wanted |= {f"{name}, mean": saved[f"{field}_mean"], f"{name}, 95th percentile": saved[f"{field}_p95"]}
    own = saved["random_own_p95"]
    wanted["random directions as long as 1 channel, 95th percentile"] = own["1"]
    wanted["random directions as long as difference of means, 95th percentile"] = own["difference_of_means"]
    wanted["random directions, 5th percentile"] = saved["random_p05"]
    assert named == {name: cells(curve) for name, curve in wanted.items()}
    assert two_way[1:] == [["1 channel", *cells(saved["two_way"]["1"])], ["2 channels", *cells(saved["two_way"]["2"])]]
    assert sets == [["set", "channels of site 1"], ["1", "3"], ["2", "3, 7"], ["1 from the sparse model alone", "5"]]
    assert norms == [["2", "1.250"], ["exact patch", "3.500"]]
    assert '"channel": "quote_type"' in page.words["steering"]


def test_results_of_other_versions_and_damaged_ones_are_refused(bare: Run) -> None:
    fields = steering()._asdict()
    for damaged, message in (
        (fields | {"nonsense": 1}, "of another version or damaged"),
        ({name: value for name, value in fields.items() if name != "searched"}, "of another version or damaged"),
        (fields | {"side_effects": {"2": {"norm": 1.0}}}, "damaged"),
    ):
        update_metrics(bare.folder, steering={TASK: damaged})
        with pytest.raises(ValueError, match=rf"metrics\.json.*{TASK} is .*{message}.*sparse-bridges steer --run"):
            write_report(bare.folder)


def test_only_the_last_bit_of_a_curve_is_rounded_away(bare: Run, tmp_path: Path) -> None:
    result: Steering = steering()._replace(exact_patch=[0.0, 0.123456789, 1e-9, 1.0])
    update_metrics(bare.folder, steering={TASK: result._asdict()})
    series = page_of(bare).data["charts"]["steering-1"]["series"]
    assert next(one["values"] for one in series if one["name"] == "exact patch") == [0, 0.1235, 1e-9, 1]
