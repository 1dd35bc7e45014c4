"""The report's head: key figures, claims with their controls, and what a reader should know before trusting them."""

from typing import Any, NamedTuple

from bridges.evaluation import RECOVERED
from bridges.run_folder import Run
from interventions.bundle.channels import Channel
from interventions.circuits.task_scores import solves
from interventions.report.circuits import CircuitPage
from interventions.report.sites import site_means
from interventions.report.steering import at_full_strength
from interventions.steering.result import DRAWN, Steering
from sparse_model.io.commands import command_line

_LARGE_EDIT = 0.1
"""P(counterfactual answer) that random directions should not pass at full strength."""


_ERROR = "0 is perfect, 1 no better than the mean"
_KL = "0 is perfect"
_FEW = "fewer are easier to read"


class Card(NamedTuple):
    """A key figure."""

    title: str
    value: str
    note: str
    scale: str
    """What is good."""


def cards(metrics: dict[str, Any]) -> list[Card]:
    """The key figures of an evaluated run."""
    if "sites" not in metrics:
        return []
    dense, sparse, mean = metrics["dense"]["ce"], metrics["sparse"], site_means(metrics)
    over = f"mean over {len(metrics['sites'])} sites"
    listed = [
        Card("dense loss", f"{dense:.3f}", "nats per held-out token", "lower is better"),
        Card("sparse loss", f"{sparse['ce']:.3f}", f"{sparse['ce'] - dense:+.3f} against dense", "near dense is good"),
        Card(
            "nonzero weights",
            f"{sparse['nonzeros']:,}",
            f"1 in {1 / sparse['nonzero_fraction']:.3g}",
            "fewer are easier to read",
        ),
        Card("NMSE to sparse", f"{mean['nmse_encode']:.3f}", over, _ERROR),
        Card("NMSE to dense", f"{mean['nmse_decode']:.3f}", over, _ERROR),
        Card("KL to sparse", f"{mean['kl_dense_to_sparse']:.3f}", f"nats, {over}", _KL),
        Card("KL to dense", f"{mean['kl_sparse_to_dense']:.3f}", f"nats, {over}", _KL),
    ]
    paths = metrics.get("paths")
    if paths:
        listed.append(Card("KL of mixed paths", f"{paths['kl']:.3f}", f"nats, mean of {paths['n']} random paths", _KL))
    return listed


def warnings(
    run: Run,
    metrics: dict[str, Any],
    channels: dict[str, Channel],
    steering: list[Steering],
    circuits: list[CircuitPage],
) -> list[str]:
    """What a reader should know before trusting the figures."""
    sentences = []
    if "sites" in metrics:
        sentences += _model_warnings(run, metrics)
    for task, baseline in metrics.get("dense_task", {}).items():
        if not solves(baseline["pair_accuracy"]):
            sentences.append(
                f"The dense model does not solve {task}: it gets both prompts of only "
                f"{baseline['pair_accuracy']:.0%} of the pairs right, so there is little to steer. Train it "
                f"longer, or take a task that `{command_line('solved-tasks', run.folder)}` lists."
            )
    for channel in channels.values():
        sentences += _channel_warnings(channel)
    for result in steering:
        sentences += _steering_warnings(result, channels)
    for page in circuits:
        sentences += _circuit_warnings(page)
    return sentences


def _circuit_warnings(page: CircuitPage) -> list[str]:
    name = f"{page.circuit.task} in the {page.circuit.model} model"
    faithfulness = page.circuit.faithfulness
    failed = []
    if page.circuit.failed and faithfulness is not None:
        failed = [
            f"The circuit for {name} failed: on evaluation prompts its task loss is {faithfulness.loss:.3f}, its "
            f"target {page.circuit.config['target_loss']:g}. Find it again with more --steps or a higher --target-loss."
        ]
    return failed + _control_warnings(page, name)


def _control_warnings(page: CircuitPage, name: str) -> list[str]:
    if page.stale:
        return [
            f"The controls of the circuit for {name} were written by another version and do not read: run them again "
            f"with `{page.command} --controls`."
        ]
    if not page.controls:
        return [
            f"The circuit for {name} is uncontrolled: pruning also finds small circuits where there is nothing. "
            f"Add controls with `{page.command} --controls`."
        ]
    failed = [control.control for control in page.controls if not control.survived]
    if not failed:
        return []
    return [
        f"The circuit for {name} fails its controls: {', '.join(failed)}. The claim does not hold as it stands; find "
        "another with other settings, such as --target-loss or --seeds."
    ]


def _channel_warnings(channel: Channel) -> list[str]:
    broken = [rule for rule in channel.rules if not rule.passed]
    return [
        f"Channel {channel.name} does not meet a rule of its search. {rule.words}. Read its steering with care, or "
        "find another with --from or --site."
        for rule in broken
    ]


def _steering_warnings(result: Steering, channels: dict[str, Channel]) -> list[str]:
    sentences = []
    random = at_full_strength(result, result.random_p95)
    if random is not None and random > _LARGE_EDIT:
        sentences.append(
            f"{result.task}: at full strength random directions of the same norm reach P = {random:.3f} (95th "
            f"percentile), above {_LARGE_EDIT}: the edit is large enough to do something in any direction. "
            "Read it at a smaller strength."
        )
    for channel in channels.values():
        curve = result.channels.get(str(len(channel.indices)))
        if channel.selection.get("task") != result.task or curve is None:
            continue
        steered = at_full_strength(result, curve)
        for field, words in DRAWN.items():
            drawn = at_full_strength(result, getattr(result, f"{field}_p95"))
            if steered is not None and drawn is not None and steered <= drawn:
                sentences.append(
                    f"{result.task}: at full strength channel {channel.name} reaches P = {steered:.3f}, no more than "
                    f"the 95th percentile of the control {words}, {drawn:.3f}. That is no evidence for the "
                    "channel: find another with --from or --site."
                )
    return sentences


def _model_warnings(run: Run, metrics: dict[str, Any]) -> list[str]:
    sentences = []
    dead_reads = sum(site["dead_reads"] for site in metrics["sites"])
    neurons = run.sparse.n_layers * run.config.sparse.d_mlp
    dead = sum(n for name, n in metrics["sparse"]["dead_channels"].items() if name.endswith("mlp.hook_post"))
    if dead:
        sentences.append(
            f"{dead} of the sparse model's {neurons} MLP neurons are zero at every held-out token: they take "
            "no part. Nothing need be done; a smaller --sparse.d-mlp would waste fewer."
        )
    if dead_reads:
        reads = len(metrics["sites"]) * run.sparse.d_model
        sentences.append(
            f"{dead_reads} of {reads} residual-read channels are zero at every held-out token: nothing can be steered "
            "by them. Nothing need be done."
        )
    for way, words in (("dense_to_sparse", "dense → sparse"), ("sparse_to_dense", "sparse → dense")):
        weak = [site["label"] for site in metrics["sites"] if not site[f"recovered_{way}"] >= RECOVERED]
        if weak:
            sentences.append(
                f"The {words} hybrid recovers less than {RECOVERED} of the loss at {', '.join(weak)}: "
                "steering there moves a poor copy of the model. More --steps train the bridges further."
            )
    return sentences
