"""What an experiment found, as figures and tables show it."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from support.report_runs import TASK, steering

from bridges.run_folder import update_metrics
from interventions.steering.result import (
    DRAWN,
    Searched,
    Steering,
    draw_steering,
    p_value,
    place_of,
    searches,
    value_at,
)


def test_the_figure_shows_every_control() -> None:
    result = steering()
    axes = Figure().subplots()
    draw_steering(axes, result)
    shown = " ".join(axes.get_legend_handles_labels()[1])
    for name in ("1 channel", "2 channels", "ridge", "exact patch", "difference of means", *DRAWN.values()):
        assert name in shown
    band = next(p for p in axes.collections if p.get_label() == "5 random directions, 5–95 %")
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(max(result.random_p95))
    (ridge,) = [line for line in axes.lines if str(line.get_label()).startswith("ridge")]
    assert ridge.get_ydata().tolist() == result.ridge["2"]
    assert ridge.get_xdata().tolist() == result.strength


def test_results_of_another_version_are_refused_with_the_command() -> None:
    fields = steering()._asdict()
    metrics = {"steering": {"now": fields, "new": fields | {"speed": 1}, "old": dict(list(fields.items())[:-1])}}
    assert Steering.from_metrics(metrics, "now", Path("runs/a b")) == steering()
    for task in ("old", "new"):
        with pytest.raises(ValueError, match=rf"'?runs/a b.metrics\.json.* sparse-bridges steer .* --task {task}$"):
            Steering.from_metrics(metrics, task, Path("runs/a b"))


def test_a_strength_is_found_by_value() -> None:
    result = steering()
    assert [place_of(result, s) for s in (0, 0.5, 1, 1.5, 0.75)] == [0, 1, 2, 3, None]
    assert value_at(result, "exact patch") == 0.9876
    with pytest.raises(ValueError, match=r"strength=1.0: this run was steered at 0, 0.5$"):
        value_at(result._replace(strength=[0.0, 0.5]), "exact patch")


def test_study_gives_medians_and_ranges_by_group(tmp_path: Path, capsys) -> None:
    import steering_study

    result = steering()
    runs = []
    for number, (p, fraction) in enumerate([(0.2, 1 / 64), (0.9, 1 / 64), (0.4, 1 / 64), (0.7, 1 / 128)]):
        one = result._replace(
            channels={"1": [0.01, 0.1, p, 0.5], "2": [0.01, 0.2, 0.95, 0.5]},
            random_own_p95={
                "1": [0.01, 0.04, 0.06, 0.2],
                "2": [0.01, 0.02, 0.03, 0.2],
                "difference_of_means": [0.06] * 4,
            },
            model=result.model | {"nonzero_fraction": fraction, "seed": number},
        )
        runs.append(str(tmp_path / f"run{number}"))
        Path(runs[-1]).mkdir()
        update_metrics(Path(runs[-1]), steering={TASK: one._asdict()})
    steering_study.main(steering_study.Options(runs=tuple(runs), strength=1))
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:]
        for line in capsys.readouterr().out.splitlines()
    }
    assert rows["strength 1"] == [
        "2 layers, 32 wide, 1/64 nonzero, where=read (3 runs)",
        "2 layers, 32 wide, 1/128 nonzero, where=read (1 run)",
    ]
    assert rows["steered, 1 channel"] == ["0.4 (0.2 to 0.9)", "0.7"]
    assert rows["P(counterfactual answer), unsteered"][0] == "0.01 (0.01 to 0.01)"
    assert rows["random directions as long as 1 channel, 95th percentile"][0] == "0.06 (0.06 to 0.06)"
    assert rows["steered, 2 channels"][1] == "0.95"
    assert (tmp_path / f"steering_study-{TASK}.png").stat().st_size > 5000
    steering_study.main(steering_study.Options(runs=tuple(runs), strength=0.5, plot=str(tmp_path / "half.png")))
    assert "steered, 1 channel | 0.1 (0.1 to 0.1)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"strength=0\.3: .*run0 was steered at 0, 0\.5, 1, 1\.5"):
        steering_study.main(steering_study.Options(runs=tuple(runs), strength=0.3))
    update_metrics(Path(runs[0]), steering={TASK: {"task": TASK}})
    with pytest.raises(ValueError, match="of another version"):
        steering_study.main(steering_study.Options(runs=tuple(runs)))


def shortened(result: Steering, count: int) -> Steering:
    """A result of the first strengths alone."""
    whole = result._asdict()
    by_set = ("channels", "two_way", "channels_low", "channels_high", "ridge", "random_own_p95", "paper", "by_patching")
    cut: dict = {name: value[:count] for name, value in whole.items() if isinstance(value, list)}
    cut |= {name: {n: curve[:count] for n, curve in whole[name].items()} for name in by_set}
    return result._replace(**cut)


def test_study_shows_each_set_at_its_chosen_strength(tmp_path: Path, capsys) -> None:
    import steering_study

    one = shortened(steering(), 3)._replace(
        strength=[0.0, 0.5, 1.0],
        channels={"1": [0.01, 0.1, 0.2], "2": [0.01, 0.5, 0.95]},
        ridge={"1": [0.01, 0.11, 0.21], "2": [0.01, 0.51, 0.91]},
        by_patching={"1": [0.01, 0.04, 0.09]},
        paper={"1": [0.01, 0.4, 0.6], "2": [0.01, 0.7, 0.98]},
        random_own_p95={"1": [0.01, 0.04, 0.06], "2": [0.01, 0.02, 0.03], "difference_of_means": [0.01, 0.03, 0.06]},
        random_p95=[0.01, 0.021, 0.031],
        difference_of_means=[0.01, 0.3, 0.7],
        exact_patch=[0.01, 0.8, 0.99],
        chosen={"1": 0.5, "by_patching 1": 0.5, "difference_of_means": 0.5},
        searched={"trained bridge": {"1": [0.4]}, "shuffled decoder": {"1": [0.1, 0.2, 0.6]}},
    )
    update_metrics(tmp_path, steering={TASK: one._asdict()})
    steering_study.main(steering_study.Options(runs=(str(tmp_path),)))
    lines = capsys.readouterr().out.splitlines()
    rows = dict(line.strip("| ").split(" | ") for line in lines if line.count(" | ") == 1)
    expected = {
        "1 channel, strength": "0.5",
        "steered, 1 channel": "0.1",
        "2 channels, strength": "1",  # none was chosen
        "steered, 2 channels": "0.95",
        "1 channel from the sparse model alone": "0.04",
        "1 channel in the paper's units": "0.6",  # at 1
        "ridge regression, 1 channel": "0.11",
        "ridge regression, 2 channels": "0.91",
        "random directions as long as 1 channel, 95th percentile": "0.04",
        "random directions, 95th percentile": "0.031",  # of the reference, which is the set of two
        "exact patch": "0.99",
        "difference of means, strength": "0.5",
        "difference of means": "0.3",
        "1 channel searched for at one norm": "0.4",
        "1 channel searched for at one norm, shuffled decoder, median": "0.2",
        "1 channel searched for at one norm, shuffled decoder, largest": "0.6",
        "1 channel searched for at one norm, shuffled decoder, p": "0.5",
    }
    assert expected.items() <= rows.items()
    # An experiment that stops short of 1 has its table, without what is read there.
    short = shortened(one, 2)._replace(chosen=one.chosen | {"2": 0.5})
    update_metrics(tmp_path, steering={TASK: short._asdict()})
    steering_study.main(steering_study.Options(runs=(str(tmp_path),)))
    printed = capsys.readouterr().out
    assert "exact patch" not in printed
    assert "| ridge regression, 1 channel | 0.11 |" in printed


def test_the_p_value_counts_ours_and_ties() -> None:
    assert p_value(0.5, [0.1, 0.5, 0.6]) == 0.75
    assert p_value(0.5, []) == 1
    searched = {"trained bridge": {"1": [0.5], "2": [0.9]}, "a": {"1": [0.1, 0.7]}, "b": {"2": [0.2, 0.4, 0.3]}}
    assert searches(steering()._replace(searched=searched)) == [
        Searched("a", "1", 0.5, pytest.approx(0.4), 0.7, 2, pytest.approx(2 / 3)),
        Searched("b", "2", 0.9, 0.3, 0.4, 3, 0.25),
    ]
