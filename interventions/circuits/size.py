"""How many edges a sparse and a dense model of about equal loss need for the tasks that both solve (paper 2.2, 3.1).

1. Of the twenty tasks those are taken that both models solve on evaluation templates, and whose target loss both whole
   models reach, calibrated, on selection prompts.
2. Each model is pruned for each of them with the same settings. From the same gates, circuits are cut out for several
   other target losses too: the curve of loss against size.
3. Each circuit has two controls: necessity against random nodes, and the same pruning of redrawn weights.
4. Edges are averaged over tasks geometrically (a circuit without edges counts as one); the ratio is dense over sparse.

Every measurement is a file of its own in the model's folder, circuits/sizes/TASK-LABEL-seedN.json, and is not made
again while weights and settings are the same.
"""

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bridges.run_folder import check_same_tokenizer, open_run, read_metrics
from interventions.circuits.ablation import Ablation
from interventions.circuits.circuit import FOLDER
from interventions.circuits.gates import fit_gates
from interventions.circuits.measures import Necessity, Repruned, necessity, reprune
from interventions.circuits.node_model import NodeModel, as_nodes, count_edges
from interventions.circuits.prune_config import PruneConfig
from interventions.circuits.pruning import Ranking, everything, reference_ablation, score, splits
from interventions.circuits.rivals import redrawn
from interventions.tasks.base import Task
from sparse_model.config import from_json
from sparse_model.data.prepare import prepare_corpus
from sparse_model.data.tokenizer import load_tokenizer
from sparse_model.io.atomic import write_text
from sparse_model.io.commands import command_line
from sparse_model.io.reading import read_json, typed
from sparse_model.io.tensors import digest
from sparse_model.model.checkpoint import load_sparse
from sparse_model.training.pretrain import PretrainConfig

Label = Literal["sparse", "dense"]
LABELS: tuple[Label, Label] = ("sparse", "dense")


class Contestant(NamedTuple):
    """One of two models to compare."""

    label: Label
    model: NodeModel
    folder: Path
    """Where its measurements go."""
    ce: float
    """Held-out next-token cross-entropy, nats."""

    @property
    def digest(self) -> str:
        """Of the model's weights."""
        return digest(self.model.module.state_dict())


class Contest(NamedTuple):
    """A sparse and a dense model with what both are measured on."""

    name: str
    sides: tuple[Contestant, Contestant]
    """Sparse, dense."""
    tokenizer: PreTrainedTokenizerFast
    n_ctx: int
    blocks: Int[Tensor, "block pos"]
    """Held-out text."""


def contest_of_run(folder: str | Path) -> Contest:
    """The sparse model of a run against its dense GPT-2. Raises what `bridges.run_folder.open_run` raises."""
    run = open_run(folder)
    ce = _figures(run.folder, f"run {command_line('evaluate', '--run', run.folder)}", "sparse", "dense")
    return Contest(
        run.folder.name,
        (
            Contestant("sparse", as_nodes(run.sparse), run.folder, ce["sparse"]["ce"]),
            Contestant("dense", as_nodes(run.dense), run.folder, ce["dense"]["ce"]),
        ),
        run.tokenizer,
        run.config.sparse.n_ctx,
        prepare_corpus(run.config, run.tokenizer, samples=run.samples).val,
    )


def contest_of_pretrained(sparse: str | Path, dense: str | Path) -> Contest:
    """Two models of sparse-bridges train-sparse, the second with all its weights (the paper's own comparison).

    Raises FileNotFoundError for a folder that is no such run, ValueError for different tokenizers and for a second
    model that is sparse too.
    """
    folders = Path(sparse).expanduser(), Path(dense).expanduser()
    configs = [from_json(PretrainConfig, folder / "config.json") for folder in folders]
    kept = configs[1].sparsity.nonzero_fraction
    if kept < 1:
        raise ValueError(
            f"dense_run={str(dense)!r} keeps {kept:.4g} of its weights: "
            "name one trained with --sparsity.nonzero-fraction 1"
        )
    tokenizers = [load_tokenizer(folder / "tokenizer") for folder in folders]
    check_same_tokenizer(tokenizers[0], tokenizers[1], f"{folders[0]}/tokenizer", f"{folders[1]}/tokenizer")
    sides = [
        Contestant(
            label,
            as_nodes(load_sparse(folder / "sparse").eval()),
            folder,
            _figures(folder, "train one in another folder", "val_ce")["val_ce"],
        )
        for label, folder in zip(LABELS, folders, strict=True)
    ]
    n_ctx = min(config.sparse.n_ctx for config in configs)
    blocks = prepare_corpus(configs[0], tokenizers[0]).val
    return Contest(folders[0].name, (sides[0], sides[1]), tokenizers[0], n_ctx, blocks[:, :n_ctx])


def _figures(folder: Path, remedy: str, *names: str) -> dict[str, Any]:
    path, metrics = folder / "metrics.json", read_metrics(folder)
    if not all(name in metrics for name in names):
        raise ValueError(f"{path} has no held-out loss: {remedy}")
    return metrics


class Settings(NamedTuple):
    """How a side is measured, besides the settings of pruning."""

    levels: tuple[float, ...]
    """Target losses of the curve, nats, besides the one that is pruned for."""
    draws: int
    """Random removals."""
    controls: bool
    """Whether redrawn weights are pruned too, which takes as long again."""


class Size(NamedTuple):
    """The circuit at one target loss."""

    target: float
    nodes: int
    edges: int
    loss: float
    """Calibrated, on selection prompts, nats."""


class Measured(NamedTuple):
    """One model on one task with one pruning seed."""

    whole_loss: float
    """Calibrated loss of the whole model on selection prompts, nats."""
    sizes: list[Size]
    """By rising target loss; targets that the whole model does not reach are left out."""
    necessity: Necessity | None
    """On evaluation prompts; None where the target was not reached."""
    redrawn: Repruned | None
    """The same pruning of redrawn weights."""

    def size_at(self, target: float) -> Size | None:
        """The circuit at a target loss."""
        return next((size for size in self.sizes if size.target == target), None)


class Measuring:
    """Measures one side on tasks with one configuration; keeps what the tasks share."""

    def __init__(self, contest: Contest, side: Contestant, config: PruneConfig, settings: Settings) -> None:
        self.contest, self.side, self.config, self.settings = contest, side, config, settings

    @cached_property
    def key(self) -> dict[str, Any]:
        """What a measurement belongs to, as JSON gives it back."""
        identity = {"digest": self.side.digest, "config": asdict(self.config)} | self.settings._asdict()
        return json.loads(json.dumps(identity))

    @cached_property
    def ablation(self) -> Ablation:
        """Ablated values of the side's model."""
        return reference_ablation(self.side.model, self.contest.blocks, self.config)

    @cached_property
    def redrawn(self) -> tuple[NodeModel, Ablation]:
        """The model with redrawn weights, and its ablated values."""
        fresh = redrawn(self.side.model, seed=self.config.seed)
        return fresh, reference_ablation(fresh, self.contest.blocks, self.config)

    def __call__(self, task: Task, *, progress: bool = False) -> Measured:
        """The measurement on a task, read from its file where that is up to date."""
        name = f"{task.name}-{self.side.label}-seed{self.config.seed}.json"
        path = self.side.folder / FOLDER / "sizes" / name
        measured = _read(path, self.key)
        if measured is None:
            measured = self._measure(task, progress)
            write_text(path, json.dumps({"key": self.key, "measured": _plain(measured)}, indent=1) + "\n")
        return measured

    def _measure(self, task: Task, progress: bool) -> Measured:
        model, config, ablation = self.side.model, self.config, self.ablation
        train, selection = splits(task, config)
        whole = score(model, everything(model), ablation, selection, config).loss
        if whole > config.target_loss:
            return Measured(whole, [], None, None)
        fitted = fit_gates(model, train, ablation, config, progress=progress)
        ranking = Ranking(model, fitted, ablation, selection, config)
        masks = {target: ranking.circuit(target) for target in sorted({*self.settings.levels, config.target_loss})}
        sizes = [
            Size(target, int(m.sum()), count_edges(model, ranking.layout.split(m)), ranking.scored(m).loss)
            for target, m in masks.items()
            if m is not None
        ]
        smallest = masks[config.target_loss]
        assert smallest is not None  # the whole model reaches that target
        evaluation = task.sample(2 * config.selection_pairs, split="evaluation", seed=config.seed)
        needed = necessity(model, ranking.layout.split(smallest), ablation, evaluation, config, self.settings.draws)
        control = None
        if self.settings.controls:
            fresh, values = self.redrawn
            control = reprune(fresh, train, selection, values, config, int(smallest.sum()), progress=progress)
        return Measured(whole, sizes, needed, control)


def _plain(measured: Measured) -> dict[str, Any]:
    return measured._asdict() | {
        "sizes": [size._asdict() for size in measured.sizes],
        "necessity": measured.necessity and measured.necessity._asdict(),
        "redrawn": measured.redrawn and measured.redrawn._asdict(),
    }


def _read(path: Path, key: dict[str, Any]) -> Measured | None:
    """A measurement whose key is this one; None for any other, or none, or a damaged file."""
    try:
        data = read_json(path, "it is measured again")
        if data["key"] != key:
            return None
        return typed(Measured, data["measured"], path, "it is measured again")
    except (OSError, ValueError, KeyError, TypeError):
        return None
