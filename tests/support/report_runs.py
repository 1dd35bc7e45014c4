"""Runs with random weights that have every part of a report."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from support.helpers import make_tiny_run

from bridges.evaluation import evaluate
from bridges.run_folder import Run, fingerprint, update_metrics
from interventions.bases.result import Bases, Effects, Row
from interventions.bundle.channels import Channel, Rule, save_channel
from interventions.bundle.evidence import Detection, Evidence, Excerpt, MarkedTokens, Readings
from interventions.circuits.ablation import Calibration, measure_ablation
from interventions.circuits.circuit import Circuit, make_circuit, save_circuit
from interventions.circuits.controls import validate
from interventions.circuits.faithfulness import AnswerScore, Faithfulness, RandomAblation
from interventions.circuits.node_model import ModelKind, as_nodes, locations
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.task_scores import score_tasks
from interventions.steering.result import Steering
from interventions.tasks.catalogue import get_task

TASK = "single_double_quote"
EVIL = '<script>alert("x")</script>'
STRENGTH = [0.0, 0.5, 1.0, 1.5]
QUICK = PruneConfig(
    steps=2, pairs=4, pool=8, selection_pairs=8, reference_tokens=512, lbfgs_steps=4, eliminate=False, target_loss=0.6
)


def steering(task: str = TASK, *, p95: float = 0.05) -> Steering:
    """Of an experiment that goes on beyond strength 1, where everything is different again."""
    effects = {
        "norm": 0.5,
        "p_target": 0.6,
        "kl": 0.0321,
        "pair_accuracy": {"with_as": 0.75, "for_while": 0.25},
        "perplexity": 4.5,
        "perplexity_counterfactual": 5.5,
    }
    return Steering(
        task=task,
        strength=STRENGTH,
        channels={"1": [0.01, 0.1, 0.2, 0.61], "2": [0.01, 0.3, 0.7321, 0.41]},
        two_way={"1": [0.02, 0.1, 0.2, 0.62], "2": [0.02, 0.3, 0.8123, 0.42]},
        random_mean=[0.01, 0.012, 0.0234, 0.11],
        random_p05=[0.01, 0.009, 0.0089, 0.12],
        random_p95=[0.01, 0.03, p95, 0.13],
        random_channels_mean=[0.01, 0.011, 0.0167, 0.14],
        random_channels_p95=[0.01, 0.02, 0.0456, 0.15],
        difference_of_means=[0.01, 0.2, 0.4567, 0.16],
        prompts=8,
        random_draws=5,
        where="read",
        site=1,
        sets={"1": [3], "2": [3, 7]},
        channels_low={"1": [0.01, 0.08, 0.15, 0.17], "2": [0.01, 0.25, 0.6543, 0.18]},
        channels_high={"1": [0.01, 0.12, 0.25, 0.63], "2": [0.01, 0.35, 0.7654, 0.43]},
        shuffled_mean=[0.01, 0.02, 0.03, 0.19],
        shuffled_p95=[0.01, 0.03, 0.0567, 0.21],
        untrained_mean=[0.01, 0.01, 0.02, 0.22],
        untrained_p95=[0.01, 0.02, 0.0345, 0.23],
        ridge={"1": [0.01, 0.1, 0.1987, 0.24], "2": [0.01, 0.2, 0.6789, 0.25]},
        exact_patch=[0.01, 0.4, 0.9876, 0.26],
        reference="2",
        random_own_p95={
            "1": [0.01, 0.02, 0.0321, 0.27],
            "2": [0.01, 0.03, p95, 0.13],
            "difference_of_means": [0.01, 0.02, 0.0432, 0.28],
        },
        norms={"2": 1.25, "exact_patch": 3.5},
        ridge_fit={"nmse": 0.111, "decoder_nmse": 0.222, "penalty": 1.0},
        side_effects={"unsteered": effects | {"pair_accuracy": {}}, "2": effects},
        experiment={"channel": "quote_type"},
        model={"layers": 2, "d_dense": 16, "d_sparse": 32, "nonzero_fraction": 1 / 64, "seed": 0},
        chosen={"2": 0.5, "difference_of_means": 1.0},
        paper={"1": [0.01, 0.14, 0.27, 0.65], "2": [0.01, 0.36, 0.79, 0.47]},
        by_patching={"1": [0.01, 0.06, 0.1357, 0.35]},
        patching_sets={"1": [5]},
        search_norm=1.0,
        searched={"trained bridge": {"1": [0.42]}, "shuffled decoder": {"1": [0.1, 0.2, 0.6]}},
        digest="",
        reach=0.9994,
    )


def bases(task: str = TASK) -> Bases:
    """Two bases at two sizes, and an edit of one direction that never reaches P .9."""

    def effects(factor: float, p: float) -> Effects:
        return Effects(factor, p, p / 10, 3.5, {"for_while": 0.5, "return_while": 1.0})

    def row(basis: str, indices: list[int], p: list[float], half: float | None, most: float | None) -> Row:
        fixed = {name: effects(norm, norm / 4) for name, norm in (("0.5", half), ("0.9", most)) if norm}
        return Row(
            basis=basis,
            latents=max(1, len(indices)),
            indices=indices,
            site=1,
            where="read",
            p=p,
            equal=p[2],
            reached={"0.5": half, "0.9": most},
            p_fixed=[value / 2 for value in p],
            kl=[round(value / 10, 4) for value in p],
            fixed=fixed,
        )

    return Bases(
        task=task,
        site=1,
        prompts=8,
        ladder=[0.25, 0.5, 1.0, 2.0],
        unit={"1 read": 1.25},
        equal=1.0,
        unsteered=0.01,
        random_p95=[0.01, 0.02, 0.04, 0.3],
        rows=[
            row("sparse channels", [5], [0.1, 0.2, 0.4, 0.6], 2.0, None),
            row("sparse channels", [5, 7, 9, 11], [0.3, 0.6, 0.9, 0.95], 0.5, 1.0),
            row("rotated axes", [1, 2, 3, 4], [0.2, 0.4, 0.8, 0.93], 1.0, 2.0),
            row("difference of means", [], [0.05, 0.1, 0.3, 0.7], 2.0, None),
        ],
        coders={"TopK autoencoder, k 8": {"nmse": 0.123, "unused": 4.0, "tokens": 20000.0}},
        comparison={"sizes": [1, 4]},
        digest="0123",
    )


def channel(name: str = "quote_type", *, share: float = 0.95, task: str | None = TASK) -> Channel:
    return Channel(
        name=name,
        site=1,
        indices=(3, 7),
        weights=(1.0, -0.5),
        description="positive in double quotes",
        statistics={"mean_member_0": [0.512, -0.25], "mean_member_1": [-0.75, 0.375]},
        selection=selection(task, share) if task else {},
        rules=(
            Rule(quantity="share of the effect", bound="at least", threshold=0.9, reached=share),
            Rule(quantity="number of indices", bound="at most", threshold=4, reached=2),
        ),
    )


def selection(task: str, share: float) -> dict[str, Any]:
    """What a search keeps with its channel."""
    sites = ((0, "attn.0", 0.91, 0.42), (1, "mlp.0", 0.73, 0.64))
    return {
        "task": task,
        "units": "exact",
        "pairs": 48,
        "criterion": "joint patching",
        "share": {"1": 0.5, "2": share},
        "sets": {"1": [3], "2": [3, 7]},
        "doses": {
            "1": {"strength": 0.75, "p": 0.321, "random_p95": 0.01},
            "2": {"strength": 1.25, "p": 0.654, "random_p95": 0.02},
        },
        "single_effect_nats": {"3": 1.375, "7": -0.625},
        "site_effects": [{"site": i, "label": of, "p_stream": s, "p_read": r} for i, of, s, r in sites],
    }


def evidence(*, auc: float = 0.91) -> Evidence:
    """What a search measures of its channel's name; no two figures are alike."""

    def detection(auc: float, by: float) -> Detection:
        return Detection(
            auc=auc, auc_twin=auc - 0.05, threshold=0.25 + by, precision=0.61 + by, recall=0.31 + by,
            inside=1.5 + by, twin=-0.5 - by, outside=-1.25 - by,
        )  # fmt: skip

    def readings(auc: float, by: float) -> Readings:
        return Readings(
            encoder=detection(auc, by), sparse=detection(auc + 0.02, by + 0.01), probe=detection(0.97, by + 0.02)
        )

    return Evidence(
        task=TASK,
        inside="in a double-quoted string",
        twin="in a single-quoted string",
        sign=1,
        text="held-out files of <stdlib>",
        selection=MarkedTokens(files=17, inside=3001, twin=402, outside=20003, new_inside=304, new_twin=205),
        evaluation=MarkedTokens(files=19, inside=4001, twin=502, outside=30003, new_inside=404, new_twin=305),
        new=readings(auc, 0.0),
        all=readings(0.93, 0.1),
        top=(Excerpt(value=3.25, label="inside", before=(5, 6), token=7, behind=(8,)),),
        bottom=(Excerpt(value=-2.75, label="outside", before=(), token=9, behind=(10, 11)),),
    )


def training_records(count: int, n_sites: int) -> list[dict[str, Any]]:
    return [
        {
            "step": i + 1,
            "tokens": i,
            "ce": 5 - i / count,
            "lr": 1e-3 / (i + 1),
            "nonzero_fraction": 0.5**i,
            "grad_rms": 1.0,
            "nmse_encode": [0.5 + site / 10 for site in range(n_sites)],
            "nmse_decode": [0.75 + site / 20 for site in range(n_sites)],
            "kl_dense_to_sparse": 1.0 + i / 7,
            "kl_sparse_to_dense": 2.0 + i / 9,
        }
        for i in range(count)
    ]


def write_training_records(run: Run, count: int = 30) -> None:
    lines = [json.dumps(record) + "\n" for record in training_records(count, run.bridges.n_sites)]
    (run.folder / "metrics.jsonl").write_text("".join(lines))


def circuit(run: Run, *, model: ModelKind = "sparse", task: str = TASK, keep: float = 0.08, **fields: Any) -> Circuit:
    """Random nodes of a run's model as a circuit; a channel's read and write at site 1 are always among them."""
    nodes = as_nodes(run.sparse if model == "sparse" else run.dense)
    generator = torch.Generator().manual_seed(1)
    kept = {at.name: torch.rand(at.width, generator=generator) < keep for at in locations(nodes.shape)}
    kept["blocks.0.hook_attn_out"][3] = kept["blocks.0.mlp.hook_in"][3] = True
    config = dataclasses.asdict(QUICK)
    given = {"tied_qk": False, "calibration": Calibration(1.0, {}), "config": config} | fields
    ablation = measure_ablation(nodes, torch.randint(run.config.sparse.d_vocab, (4, 32)))
    found = make_circuit(
        nodes,
        kept,
        task=task,
        fingerprint=fingerprint(run),
        loss=0.2,
        unpruned_loss=0.1,
        ablation=ablation,
        **given,
    )
    save_circuit(run.folder, found)
    return found


def controlled(run: Run, found: Circuit) -> Circuit:
    """A circuit with its controls, after next to no pruning, saved."""
    task = get_task(TASK, run.tokenizer, max_tokens=64)
    pairs = [task.sample(8, split=split, seed=0) for split in ("train", "selection", "evaluation")]
    blocks = torch.randint(run.config.sparse.d_vocab, (8, 32))
    result = validate(as_nodes(run.sparse), found, *pairs, blocks, QUICK, draws=2)
    found = dataclasses.replace(found, controls=result.to_dict())
    save_circuit(run.folder, found)
    return found


def tasks_and_sizes(run: Run) -> dict[str, Any]:
    """What solved-tasks writes, measured, and the part of circuit_size.py's figures that the report shows."""
    models = {"dense": as_nodes(run.dense), "sparse": as_nodes(run.sparse)}
    scores = score_tasks(models, run.tokenizer, max_tokens=48, pairs=4, seed=0)
    tasks = {
        name: {"unsupported": of} if isinstance(of, str) else {label: s._asdict() for label, s in of.items()}
        for name, of in scores.items()
    }
    tasks[TASK]["floors"] = {"evaluation": {"bigram": 0.0, "trigram": 0.5, "5-gram": 0.98}}
    edges = {"dense": [{"edges": 90}, {"edges": 110}, {"edges": 400}], "sparse": [{"edges": n} for n in (4, 5, 0)]}
    ratios = {"tasks": [TASK], "ratio": [22.5, 22.0, 400.0]}
    sizes = {"target_loss": 0.15, "ce": {"sparse": 1.75, "dense": 1.5}, "with_edges": ratios, "tasks": {TASK: edges}}
    return {"tasks": tasks, "circuit_size": sizes | {"left_out": {"with_as": "not solved by <both>"}}}


def full_run(folder: Path, name: str = "quote_type") -> Run:
    """A run that has every part of the report; the channel has the name given."""
    run = make_tiny_run(folder)
    tokens = torch.randint(run.config.sparse.d_vocab, (4, 32))
    update_metrics(run.folder, **evaluate(run.dense, run.sparse, run.bridges, tokens, progress=False))
    update_metrics(
        run.folder,
        held_out_tokens=7654321,
        training={
            "dense_seconds": 1234.5,
            "joint_seconds": 65432.1,
            "processes": 3,
            "device": "cpu",
            "threads": 5,
            "corpus": {"splits": {"train": {"tokens": 9876543}}, "notes": ["a note on the corpus"]},
        },
        dense_task={TASK: {"pair_accuracy": 0.97, "p_right": 0.91, "p_wrong": 0.02}},
        steering={TASK: steering()._asdict()},
        bases={TASK: bases().plain()},
        **tasks_and_sizes(run),
    )
    write_training_records(run)
    save_channel(run.folder, channel(name))
    controlled(run, circuit(run))
    circuit(run, model="dense", tied_qk=True)
    return run


SCORES = Faithfulness(
    log_odds_share=0.0283,
    loss=0.606,
    accuracy=0.25,
    whole=AnswerScore(0.01, 1.0, 0.0),
    alone=AnswerScore(0.65, 0.75, 0.2),
    random=[RandomAblation(0.1, [AnswerScore(0.1, 0.9, 0.01), AnswerScore(0.3, 0.5, 0.03)])],
    worst=AnswerScore(11.5, 0.0, 0.69),
    worst_share=0.486,
    attack_passes=113,
)
"""Of a circuit that fails on evaluation prompts."""
