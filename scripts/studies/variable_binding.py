"""How a model tells a set from a string that it initialised under a name: a two-hop copy, or something else.

A copy in two hops would bring the name to the type's token in an early layer, and look it up from the name's use in a
later one. Measured on selection prompts:

1. Where the type is: the share of the log-odds that moves when the stream at one place of the prompt alone is the other
   prompt's, site by site.
2. Which heads bring it: their share by interchange (q, k and v together, and each part), and where they look from the
   last token; and what moves with as many random channels.
And on evaluation prompts, which choose nothing:
3. Whether the name matters: pairs right where another name is initialised too, before or behind, as a set or a string;
   how far that name's type moves the answer, as a share of what the own type does; and pairs of prompts in which the
   two names have different types and only the name at the end differs.

Examples:
    python scripts/studies/variable_binding.py demo runs/sparse-1
    python scripts/studies/variable_binding.py demo --task set_or_string
"""

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from bracket_counting import Kept
from bracket_tables import digits, table
from carriers import head_nodes, head_table, share_of
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bridges.dense import Sublayered
from bridges.hybrid import residuals, suffix
from bridges.packaged import find_run
from bridges.sites import all_sites
from interventions.circuits.attention import Head, first_differences, looks
from interventions.circuits.interchange import interchange
from interventions.circuits.node_model import NodeModel, as_nodes
from interventions.circuits.task_scores import score_task, solves
from interventions.cli.options import report_errors
from interventions.tasks.base import TaskBatch, log_odds
from interventions.tasks.catalogue import get_task
from interventions.tasks.reports import models_in
from sparse_model.config import require
from sparse_model.data.generated_python import NOUNS
from sparse_model.data.tokenizer import load_tokenizer
from sparse_model.io.atomic import check_writable

_TOLD = 4
"""Heads that are told."""
_TYPES = ("set", "str")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model tells a set from a string that it initialised under a name."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ("demo",)
    """Run folders, or the name of a packaged bundle; one with a sparse or a dense model alone will do."""
    task: Literal["set_or_string_fixedvarname", "set_or_string"] = "set_or_string_fixedvarname"
    """One name in all prompts, or any."""
    out: str = "runs/binding"
    """Folder of what is found."""
    pairs: int = 32
    """Pairs of prompts, of selection as of evaluation templates."""
    draws: int = 20
    """Random sets of channels."""
    seed: int = 0
    """Seeds prompts and draws."""

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "runs", self.runs, "name at least one run folder")
        require(self.pairs >= 2, "pairs", self.pairs, "must be at least 2")
        require(self.draws >= 1, "draws", self.draws, "must be at least 1")


def places(batch: TaskBatch) -> dict[str, Int[Tensor, " pair"]]:
    """Positions in each pair; the loop's head is what lies between."""
    first = first_differences(batch)
    return {"name": first - 2, "type": first, "()": first + 1, "line's end": first + 2, "last": batch.last}


def masks(batch: TaskBatch) -> dict[str, Tensor]:
    """The same as masks [pair, pos], and everything else."""
    pos = torch.arange(batch.tokens.shape[-1])
    found = {name: pos == at[:, None] for name, at in places(batch).items()}
    return {**found, "elsewhere": ~torch.stack(list(found.values())).any(0)}


@torch.no_grad()
def holders(model: Sublayered, batch: TaskBatch) -> dict[str, dict[str, float]]:
    """Share of the log-odds that moves with the stream at one place alone, by site."""
    tokens = batch.tokens.flatten(0, 1)
    streams = residuals(model, tokens)
    whole = log_odds(suffix(model, 0, streams[0], tokens).unflatten(0, (-1, 2)), batch)
    found: dict[str, dict[str, float]] = {}
    for site in all_sites(model.n_layers):
        here = streams[site.index].unflatten(0, (-1, 2))
        for place, mask in masks(batch).items():
            mixed = torch.where(mask[:, None, :, None], here.flip(1), here).flatten(0, 1)
            moved = log_odds(suffix(model, site.index, mixed, tokens).unflatten(0, (-1, 2)), batch)
            found.setdefault(site.label, {})[place] = float((whole - moved).mean() / (2 * whole.mean()))
    return found


def head_facts(model: NodeModel, batch: TaskBatch, options: Options) -> dict[str, dict[str, Any]]:
    """The heads with the largest shares: by part, and where they look from the last token."""
    found = {}
    for name, facts in list(head_table(model, batch).items())[:_TOLD]:
        layer, of_layer = map(int, name.split("."))
        head: Head = (layer, of_layer)
        seen = {
            place: looks(model, [head], batch, onto=at)[head].first
            for place, at in places(batch).items()
            if place != "last"
        }
        parts = {part: share_of(model, head_nodes(model, head, part), batch) for part in "qkv"}
        random = max(interchange(model, head_nodes(model, head), batch, options.draws, seed=options.seed).random)
        found[name] = {"share": facts["share"], "random": random, "even": facts["even"], **parts, "looks": seen}
    return found


class Other(NamedTuple):
    """What is done with another name."""

    where: Literal["before", "behind"]
    """Whether its line comes before that of the task's own name."""
    kind: str
    """What it is initialised to."""
    used: bool = False
    """Whether the second prompt uses it in place of the task's name; the first prompt's type is then that of both."""


def rewritten(batch: TaskBatch, tokenizer: PreTrainedTokenizerFast, other: Other) -> TaskBatch:
    """The pairs with another name that is initialised too. Where it is used, only the name at the end differs."""
    texts = []
    for pair in batch.prompts:
        words = set(re.findall(r"\w+", pair[0]))
        name = next(noun for noun in NOUNS if noun not in words)
        own = pair[1 - _TYPES.index(other.kind)] if other.used else ""  # of the type that the other name has not
        texts.append(
            [_with_other(own or text, name, other, other.used and member == 1) for member, text in enumerate(pair)]
        )
    end, swapped = tokenizer.eos_token_id, other.used and other.kind == "set"
    rows = [[[end, *tokenizer.encode(text, add_special_tokens=False)] for text in pair] for pair in texts]
    require(all(len(a) == len(b) for a, b in rows), "tokenizer", other, "both prompts must be as many tokens")
    width = max(len(a) for a, _ in rows)
    return TaskBatch(
        tokens=torch.tensor([[ids + [end] * (width - len(ids)) for ids in pair] for pair in rows]),
        answers=batch.answers.flip(1) if swapped else batch.answers,
        last=torch.tensor([len(a) - 1 for a, _ in rows]),
        prompts=[(a, b) for a, b in texts],
    )


def _with_other(text: str, name: str, other: Other, used: bool) -> str:
    *lead, definition, loop, use = text.split("\n")
    line = f"{name} = {other.kind}()"
    both = [line, definition] if other.where == "before" else [definition, line]
    return "\n".join([*lead, *both, loop, f"    {name}" if used else use])


def binding(model: NodeModel, batch: TaskBatch, tokenizer: PreTrainedTokenizerFast) -> dict[str, dict[str, float]]:
    """Pairs right, and what the other name's type moves, by what is done with the other name; means over both types."""
    found = {"alone": {"right": score_task(model, batch).pair_accuracy}}
    for where in ("before", "behind"):
        changed = [rewritten(batch, tokenizer, Other(where, kind)) for kind in _TYPES]
        as_set, as_string = (toward_set(model, of) for of in changed)
        own = (as_set + as_string) / 2
        moved = float((as_set - as_string).mean() / (own[:, 0] - own[:, 1]).mean())
        right = [score_task(model, of).pair_accuracy for of in changed]
        found[f"another name {where}"] = {"right": sum(right) / 2, "moves": moved}
    for where in ("before", "behind"):
        right = [
            score_task(model, rewritten(batch, tokenizer, Other(where, kind, True))).pair_accuracy for kind in _TYPES
        ]
        found[f"another name {where}, used in one prompt"] = {"right": sum(right) / 2, "least": min(right)}
    return found


@torch.no_grad()
def toward_set(model: NodeModel, batch: TaskBatch) -> Float[Tensor, "pair 2"]:
    """Log-odds of the set's answer behind both prompts of each pair."""
    logits = model.logits(batch.tokens.flatten(0, 1), None, batch.last.repeat_interleave(2))[:, 0].unflatten(0, (-1, 2))
    as_set, as_string = (batch.answers[:, None, [kind]].expand(-1, 2, 1) for kind in (0, 1))
    return (logits.gather(2, as_set) - logits.gather(2, as_string))[..., 0]


def study(folder: Path, options: Options) -> dict[str, dict[str, Any]]:
    """What is found of each model of a run."""
    tokenizer, found = load_tokenizer(folder / "tokenizer"), {}
    for label, module in models_in(folder, "cpu").items():
        keep = Kept(Path(options.out) / folder.name, as_nodes(module), options)
        found[label] = keep(f"{options.task}-{label}", partial(tell, module, tokenizer, options))
    return found


def tell(module: Any, tokenizer: PreTrainedTokenizerFast, options: Options) -> dict[str, Any]:
    """What is found of one model; of one that does not solve the task that alone."""
    model = as_nodes(module)
    task = get_task(options.task, tokenizer, max_tokens=model.shape.n_ctx)
    selection, evaluation = (
        task.sample(options.pairs, split=split, seed=options.seed) for split in ("selection", "evaluation")
    )
    right = score_task(model, evaluation).pair_accuracy
    if not solves(right):
        return {"right": right}
    return {
        "right": right,
        "holders": holders(module, selection),
        "heads": head_facts(model, selection, options),
        "binding": binding(model, evaluation, tokenizer),
    }


def markdown(name: str, label: str, found: dict[str, Any]) -> str:
    parts = [f"\n## {name}, {label} model: {found['right']:.2f} of the evaluation pairs right"]
    if "heads" not in found:
        return f"{parts[0]}: not solved, nothing is told"
    columns = list(next(iter(found["holders"].values())))
    rows = [[site, *(digits(of[column]) for column in columns)] for site, of in found["holders"].items()]
    parts.append(table(["stream at site", *columns], rows))
    seen = list(next(iter(found["heads"].values()))["looks"])
    rows = [
        [head, *(digits(of[part]) for part in ("share", "random", *"qkv")), *(digits(of["looks"][at]) for at in seen)]
        for head, of in found["heads"].items()
    ]
    parts.append(table(["head", "share", "random", *"qkv", *(f"looks at {at}" for at in seen)], rows))
    rows = [
        [what, digits(of["right"]), *(digits(of[name]) if name in of else "" for name in ("least", "moves"))]
        for what, of in found["binding"].items()
    ]
    parts.append(
        table(["evaluation prompts", "pairs right", "of the worse type", "moved by the other name's type"], rows)
    )
    return "\n\n".join(parts)


def main(options: Options) -> None:
    check_writable(Path(options.out))
    results = {}
    for name in options.runs:
        folder = find_run(name)
        results[folder.name] = study(folder, options)
        for label, found in results[folder.name].items():
            print(markdown(folder.name, label, found), flush=True)
    print(f"kept in {options.out}: {json.dumps({name: list(found) for name, found in results.items()})}")


if __name__ == "__main__":
    with torch.no_grad(), report_errors():
        main(tyro.cli(Options))
