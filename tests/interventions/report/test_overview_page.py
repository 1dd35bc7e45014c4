"""Every number of the report's first page equals the run's files: key figures, warnings, both summaries, the models."""

import json
import re
import statistics
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from support.report_page import Page, page_of
from support.report_runs import TASK, channel, steering

from bridges.packaged import FOLDER
from bridges.run_folder import Run, update_metrics
from interventions.bundle.channels import Rule, load_channels, save_channel
from interventions.report.overview import cards
from interventions.report.steering import steering_pages
from interventions.steering.headline import Headline, headline
from interventions.steering.result import Steering


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_key_figures(full: Run, page: Page) -> None:
    metrics = read(full.folder / "metrics.json")
    dense, sparse, sites = metrics["dense"]["ce"], metrics["sparse"], metrics["sites"]

    def mean(name: str) -> str:
        return f"{statistics.fmean(site[name] for site in sites):.3f}"

    assert page.cards == {
        "dense loss": (f"{dense:.3f}", "nats per held-out token"),
        "sparse loss": (f"{sparse['ce']:.3f}", f"{sparse['ce'] - dense:+.3f} against dense"),
        "nonzero weights": (f"{sparse['nonzeros']:,}", f"1 in {sparse['nonzero_fraction'] ** -1:.3g}"),
        "NMSE to sparse": (mean("nmse_encode"), "mean over 5 sites"),
        "NMSE to dense": (mean("nmse_decode"), "mean over 5 sites"),
        "KL to sparse": (mean("kl_dense_to_sparse"), "nats, mean over 5 sites"),
        "KL to dense": (mean("kl_sparse_to_dense"), "nats, mean over 5 sites"),
        "KL of mixed paths": (f"{metrics['paths']['kl']:.3f}", f"nats, mean of {metrics['paths']['n']} random paths"),
    }
    assert cards({}) == []


def test_steering_is_read_at_strength_1(page: Page) -> None:
    """By hand from `steering()`, where everything is different at the last strength of the ladder."""
    header, first, second, alone = page.tables["steering-summary"]
    assert header[:4] == ["task", "edit", "unsteered", "steered"]
    drawn = ["0.0500", "0.0456", "0.0567", "0.0345"]
    dense_only = ["0.4567", "0.9876"]
    assert first == [TASK, "1 channel", "0.0100", "0.2000(0.150 … 0.250)", *drawn, "0.1987", *dense_only]
    assert second == ["", "2 channels", "0.0100", "0.7321(0.654 … 0.765)", *drawn, "0.6789", *dense_only]
    unsteered = ["", "1 channel from the sparse model alone", "0.0100"]
    assert alone == [*unsteered, "0.1357", *drawn, "not measured", *dense_only]


@pytest.mark.parametrize("task", ["single_double_quote", "while_return_true", "for_while"])
def test_the_packaged_runs_steering_is_read_at_strength_1(task: str) -> None:
    metrics = read(FOLDER / "demo" / "metrics.json")
    found = metrics["steering"][task]
    place = [round(s, 6) for s in found["strength"]].index(1)
    (page,) = [page for page in steering_pages(FOLDER / "demo", metrics) if page.result.task == task]
    assert len(page.claims) == 8
    for claim, (n, curve) in zip(page.claims[4:], found["by_patching"].items(), strict=True):
        assert claim.edit == f"{n} channel{'' if n == '1' else 's'} from the sparse model alone"
        assert (claim.unsteered, claim.steered) == (curve[0], curve[place])
    for claim, (n, curve) in zip(page.claims[:4], found["channels"].items(), strict=True):
        assert claim.edit == f"{n} channel{'' if n == '1' else 's'}"
        assert (claim.unsteered, claim.steered) == (curve[0], curve[place])
        assert claim.interval == (found["channels_low"][n][place], found["channels_high"][n][place])
        names = ("random_p95", "random_channels_p95", "shuffled_p95", "untrained_p95")
        wanted = [found[name][place] for name in names] + [found["ridge"][n][place]]
        assert claim.controls == [*wanted, found["difference_of_means"][place], found["exact_patch"][place]]


def test_a_strength_that_was_not_measured_is_said_to_be_so(bare: Run) -> None:
    result = steering()._replace(strength=[0.1, 0.5, 0.75, 2.0], random_p95=[0.5] * 4)
    update_metrics(bare.folder, steering={TASK: result._asdict()})
    page = page_of(bare)
    assert page.tables["steering-summary"][1][2:] == ["not measured"] * 9
    assert not [warning for warning in page.warnings if "full strength" in warning]


def test_circuits_in_short(full: Run, page: Page) -> None:
    rows = page.tables["circuit-summary"][1:]
    assert [row[1] for row in rows] == ["sparse", "dense"]
    for row, name in zip(rows, (TASK, f"{TASK}-dense"), strict=True):
        saved = read(full.folder / "circuits" / f"{name}.json")
        nodes, edges = len(set(saved["nodes"])), len(saved["edges"])
        assert row[:1] + row[2:6] == [TASK, f"{nodes:,}", f"{edges:,}", "0.200", "0.100"]
    judged = [row[1] for row in page.tables["controls words"][1:]]
    assert rows[0][-1] == f"{judged.count('survived')} of {len(judged)} survived"
    assert rows[1][-1] == "uncontrolled"


def test_models_and_data(full: Run, page: Page) -> None:
    config, dense, sparse = full.config, full.dense.hf, full.sparse
    rows = {row[0]: row[1:] for row in page.tables["models"][1:]}
    neurons = [dense.transformer.h[0].mlp.c_fc.weight.shape[1], len(sparse.blocks[0].mlp.fc.weight)]
    assert rows == {
        "layers": [str(len(dense.transformer.h)), str(len(sparse.blocks))],
        "width": [str(dense.transformer.wte.weight.shape[1]), str(sparse.token_embed.weight.shape[1])],
        "MLP neurons per layer": [str(count) for count in neurons],
        "heads": ["2", f"2 of {config.sparse.d_head}"],
        "active share": ["all", "0.25"],
        "nonzero share": ["all", f"1/{1 / config.sparsity.nonzero_fraction:.3g}"],
        "optimizer steps": [f"{config.dense_train.steps:,}", f"{config.steps:,}"],
        "seconds": ["1,234", "65,432"],
    }
    assert {row[0]: row[1] for row in page.tables["data-table"]} == {
        "dense model": "trained on the corpus for this run",
        "corpus": config.corpus,
        "tokens": "9,876,543 for training, 7,654,321 held out for the figures here",
        "machine": "3 × cpu, 5 threads",
        "vocabulary, context": "384 tokens, 64 at a time",
        "batch": f"{config.batch_size} blocks of 64 tokens per process",
        "seed": "0",
    }
    assert "a note on the corpus" in page.words["overview"]


def test_a_run_that_was_only_trained_says_how_much_text_it_asked_for(bare: Run) -> None:
    assert ["tokens", "at most 20,000 for training"] in page_of(bare).tables["data-table"]


def test_warnings_of_the_models(full: Run, page: Page) -> None:
    metrics = read(full.folder / "metrics.json")
    dead = [metrics["sparse"]["dead_channels"][f"blocks.{layer}.mlp.hook_post"] for layer in (0, 1)]
    reads = [site["dead_reads"] for site in metrics["sites"]]
    wanted = []
    if sum(dead):
        wanted.append(
            f"{sum(dead)} of the sparse model's 128 MLP neurons are zero at every held-out token: they take "
            "no part. Nothing need be done; a smaller --sparse.d-mlp would waste fewer."
        )
    if sum(reads):
        wanted.append(
            f"{sum(reads)} of 160 residual-read channels are zero at every held-out token: nothing "
            "can be steered by them. Nothing need be done."
        )
    for words, way in (("dense → sparse", "dense_to_sparse"), ("sparse → dense", "sparse_to_dense")):
        weak = ", ".join(site["label"] for site in metrics["sites"] if not site[f"recovered_{way}"] >= 0.8)
        if weak:
            wanted.append(
                f"The {words} hybrid recovers less than 0.8 of the loss at {weak}: steering "
                "there moves a poor copy of the model. More --steps train the bridges further."
            )
    assert len(wanted) >= 2  # of a run of random weights
    assert page.warnings[: len(wanted)] == wanted
    failed = [row[0] for row in page.tables["controls words"][1:] if row[1] == "failed"]
    assert (
        f"The circuit for {TASK} in the sparse model fails its controls: {', '.join(failed)}. The claim does not "
        "hold as it stands; find another with other settings, such as --target-loss or --seeds." in page.warnings
    )
    assert (
        "The sizes of circuits compare a sparse model of 1.750 nats with a dense one of 1.500: at unequal loss the "
        "ratio says little. Compare models of about equal loss, with --sparse-runs and --dense-runs." in page.warnings
    )
    for words in ("does not solve", "does not meet", "at full strength"):
        assert not [warning for warning in page.warnings if words in warning]


def test_warnings_of_steering_and_channels(bare: Run) -> None:
    save_channel(bare.folder, channel(share=0.7))
    update_metrics(
        bare.folder,
        dense_task={TASK: {"pair_accuracy": 0.52, "p_right": 0.5, "p_wrong": 0.4}, "with_as": {"pair_accuracy": 0.9}},
        steering={TASK: steering(p95=0.8)._asdict()},
    )
    assert page_of(bare).warnings == [
        f"The dense model does not solve {TASK}: it gets both prompts of only 52% of the pairs right, so there is "
        f"little to steer. Train it longer, or take a task that `sparse-bridges solved-tasks {bare.folder}` lists.",
        "Channel quote_type does not meet a rule of its search. Share of the effect: 0.7 reached, at least 0.9 asked "
        "for. Read its steering with care, or find another with --from or --site.",
        f"{TASK}: at full strength random directions of the same norm reach P = 0.800 (95th percentile), above 0.1: "
        "the edit is large enough to do something in any direction. Read it at a smaller strength.",
        f"{TASK}: at full strength channel quote_type reaches P = 0.732, no more than the 95th percentile of the "
        "control random directions, 0.800. That is no evidence for the channel: find another with --from or --site.",
    ]


@pytest.mark.parametrize(
    ("bound", "passed"),
    [("at least", [False, True, True]), ("more than", [False, False, True]), ("at most", [True, True, False])],
)
def test_rules_at_their_limit(bound: Any, passed: list[bool]) -> None:
    rules = [Rule(quantity="size", bound=bound, threshold=2, reached=reached) for reached in (1.9, 2, 2.1)]
    assert [rule.passed for rule in rules] == passed
    assert rules[0].words == f"Size: 1.9 reached, {bound} 2 asked for"


def test_the_report_opens_with_what_was_found_at_the_chosen_strength(full: Run, page: Page, bare: Run) -> None:
    """By hand from `steering()`: the channel has two indices, whose chosen strength is 0.5."""
    ((verdict, words),) = re.findall(r'<p class="finding (\w+)">(.*?)</p>', page.html)
    assert (verdict, unescape(words)) == (
        "middling",
        "Found in part: 2 channels of the sparse model at strength 0.5, chosen on other prompts, take the dense "
        f"model's P(counterfactual answer) on {TASK} from 0.010 to 0.300, where the counterfactual prompts have "
        "0.999; 95 % of random directions as long give at most 0.030, and it does not turn the answer round.",
    )
    assert page.html.index('class="finding') < page.html.index('class="cards"') < page.html.index('class="warnings"')
    assert '<p class="finding">Nothing has been steered yet: what the channels do' in page_of(bare).html


@pytest.mark.parametrize("task", ["single_double_quote", "while_return_true", "for_while"])
def test_the_packaged_findings_are_those_of_its_files(task: str) -> None:
    metrics, channels = read(FOLDER / "demo" / "metrics.json"), load_channels(FOLDER / "demo")
    found = metrics["steering"][task]
    (name,) = [c["channel"] for c in [found["experiment"]]]
    size = str(len(read(FOLDER / "demo" / "channels.json")[name]["indices"]))
    strength = found["chosen"][size]
    place = [round(s, 6) for s in found["strength"]].index(strength)
    finding = headline(Steering(**found), channels)
    assert finding is not None
    assert (finding.size, finding.strength, finding.task) == (size, strength, task)
    assert finding.unsteered == found["channels"][size][0]
    assert finding.steered == found["channels"][size][place]
    assert finding.random_p95 == found["random_own_p95"][size][place]
    assert finding.reach == found["reach"]


@pytest.mark.parametrize(
    ("steered", "random", "verdict", "begins"),
    [
        (0.9, 0.0595, "good", "Found: 1 channel of"),
        (0.9, 0.0596, "middling", "Found in part: "),
        (0.505, 0.02, "middling", "Found in part: "),
        (0.506, 0.02, "good", "Found: 1 channel of"),
        (0.3, 0.3, "bad", "Nothing was found: "),
    ],
)
def test_verdicts_at_their_limits(steered: float, random: float, verdict: str, begins: str) -> None:
    finding = Headline("t", "1", 1.5, 0.01, steered, random, 1.0)
    assert finding.verdict == verdict
    assert finding.words.startswith(begins)
    assert f"{random:.3f}" in finding.words


def test_a_verdict_is_a_share_of_what_there_is_to_reach() -> None:
    """In ordinary text many tokens may follow; halfway from .086 to .425 the answer is turned round."""
    assert Headline("t", "1", 1.5, 0.086, 0.26, 0.1, 0.425).verdict == "good"
    assert Headline("t", "1", 1.5, 0.086, 0.25, 0.1, 0.425).verdict == "middling"
    assert Headline("t", "1", 1.5, 0.086, 0.26, 0.11, 0.425).verdict == "middling"
    assert "where the counterfactual prompts have 0.425;" in Headline("t", "1", 1.5, 0.086, 0.26, 0.1, 0.425).words
    assert Headline("t", "1", 1.5, 0.2, 0.3, 0.2, 0.2).verdict == "middling"  # nothing to reach
