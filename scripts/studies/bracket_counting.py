"""How a model counts brackets, and why a longer list makes it fail: told by measurement.

1. On selection prompts, three names in every list: the head with which most of the log-odds moves, the channels in it,
   what they read (detectors), the channel that it writes (depth), and what reads that. All by interchange; frozen then.
2. The law of dilution. Attention is a sum over tokens, so a list of n names is foretold from one of three by counting
   its names n/3 times in the attention formula (`attention.as_if_repeated`), the weights as they are: in all heads, in
   the head found alone, in the layers before it alone; and, as the paper has it, by an even average over all tokens.
   Foretold for evaluation prompts from their three names, and written to OUT/NAME/prediction-*.safetensors, its digest
   to prediction-*.json, before the model is run on other lists. Nulls: no dilution, every other head alone, and the
   foretold numbers of names in another order.
3. The same prompts with all their names, in the sparse and the dense model.
4. In the dense model of a bridged run the channel is moved through the bridge: on lists with so many names that it
   fails, by as much as dilution took from it, or towards the deeper bracket; and back on lists of three. Beside it all
   channels, the difference of means, and random directions as long.

What is in OUT already, of the same weights and options, is not made again.

Examples:
    python scripts/studies/bracket_counting.py demo
    python scripts/studies/bracket_counting.py runs/bundle runs/dense-1 runs/dense-2 --out runs/brackets
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from bracket_figures import draw
from bracket_laws import compare, find_roles, measure, predict
from bracket_prompts import SHORT, batches
from bracket_steering import steer
from bracket_tables import markdown, seeds_table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bridges.packaged import find_run
from bridges.run_folder import open_run
from interventions.circuits.circuit import circuit_paths, load_circuit
from interventions.circuits.node_model import NodeModel, as_nodes
from interventions.cli.options import report_errors
from interventions.tasks.base import TaskBatch
from interventions.tasks.reports import models_in
from sparse_model.config import require
from sparse_model.data.tokenizer import load_tokenizer
from sparse_model.io.atomic import check_writable, replace_file, write_text
from sparse_model.io.reading import read_json
from sparse_model.training.identity import digest_of

TASK = "bracket_counting"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model counts brackets, and why a longer list makes it fail."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ("demo",)
    """Run folders, or the name of a packaged bundle; one with a sparse or a dense model alone will do. The figure is of
    the first, with the dense models of the others."""
    out: str = "runs/brackets"
    """Folder of what is found."""
    numbers: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 10, 12, 15, 18)
    """How many names the lists have; three is always among them."""
    pairs: int = 32
    """Pairs of prompts, of selection as of evaluation templates."""
    draws: int = 20
    """Random nodes and directions; fifty times as many orders of the numbers of names."""
    seed: int = 0
    """Seeds prompts and draws."""

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "runs", self.runs, "name at least one run folder")
        require(min(self.numbers, default=0) >= 1, "numbers", self.numbers, "name some, of at least 1")
        require(self.pairs >= 2, "pairs", self.pairs, "must be at least 2")
        require(self.draws >= 1, "draws", self.draws, "must be at least 1")


Prompts = dict[str, dict[int, TaskBatch]]
"""By split and number of names."""


def make_prompts(tokenizer: PreTrainedTokenizerFast, options: Options, n_ctx: int) -> Prompts:
    numbers = sorted({SHORT, *options.numbers})
    return {
        split: batches(tokenizer, numbers, pairs=options.pairs, split=split, seed=options.seed, n_ctx=n_ctx)
        for split in ("selection", "evaluation")
    }


class Kept:
    """What a model's part of OUT holds already, by the weights and options it was made with."""

    def __init__(self, folder: Path, model: NodeModel, options: Options) -> None:
        settings = {name: value for name, value in asdict(options).items() if name not in ("runs", "out")}
        weights = digest_of([tensor.detach() for tensor in model.module.state_dict().values()])
        self.folder, self.key = folder, hashlib.sha256(json.dumps([weights, settings]).encode()).hexdigest()

    def __call__(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is in NAME.json, made where it is not there or of something else."""
        path = self.folder / f"{name}.json"
        if path.is_file():
            stored = read_json(path, "remove it, and it is made again", finite=False)
            if isinstance(stored, dict) and stored.get("key") == self.key:
                return stored
        made = {"key": self.key, **make()}
        write_text(path, json.dumps(made, indent=1) + "\n")
        return made

    def register(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that are written, with their digest beside them, before anything else is done."""
        path = self.folder / f"{name}.safetensors"

        def write() -> dict[str, Any]:
            with replace_file(path) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in make().items()}, temporary)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            print(f"registered, before longer lists are run: {path}, sha256 {digest}", flush=True)
            return {"sha256": digest, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")}

        record = self(name, write)
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        if found != record["sha256"]:
            raise ValueError(f"{path} is not what was registered ({found[:12]}): delete {path.with_suffix('.json')}")
        return load_file(path)


def study(folder: Path, options: Options) -> dict[str, Any]:
    """All of one run: by model, and of its steering where it is bridged."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    models = {label: as_nodes(model) for label, model in models_in(folder, "cpu").items()}
    prompts = make_prompts(tokenizer, options, min(model.shape.n_ctx for model in models.values()))
    out, found = Path(options.out) / folder.name, {}
    bridged = len(models) == 2
    run = open_run(folder) if bridged else None
    circuit = load_circuit(run, TASK) if run and circuit_paths(folder, TASK)[0].is_file() else None
    keepers = {label: Kept(out, model, options) for label, model in models.items()}
    for label, model in models.items():
        keep = keepers[label]
        roles = keep(f"roles-{label}", lambda model=model: find_roles(model, prompts["selection"], tokenizer, options))
        foretold = keep.register(
            f"prediction-{label}",
            lambda model=model, roles=roles, label=label: predict(
                model, roles, prompts["evaluation"], circuit if label == "sparse" else None
            ),
        )
        found[label] = {"roles": roles, "predicted": foretold}
    for label, model in models.items():  # now longer lists
        roles, foretold, keep = found[label]["roles"], dict(found[label]["predicted"]), keepers[label]
        if label == "dense" and bridged:
            foretold["sparse"] = found["sparse"]["predicted"]["all heads"]

        def compared(model: NodeModel = model, roles: Any = roles, foretold: Any = foretold) -> dict[str, Any]:
            return compare(foretold, measure(model, roles, prompts), sorted(prompts["evaluation"]), options)

        found[label]["figures"] = keep(f"figures-{label}", compared)
    if run is not None and "depth" in found["sparse"]["roles"]:
        dense = found["dense"]["figures"]["measured"]
        found["steering"] = keepers["sparse"](
            "steering", lambda: steer(run, found["sparse"]["roles"], prompts, dense, options)
        )
    return found


def main(options: Options) -> None:
    check_writable(Path(options.out))
    started, results = time.process_time(), {}
    for name in options.runs:
        folder = find_run(name)
        results[folder.name] = study(folder, options)
        print(markdown(folder.name, results[folder.name]), flush=True)
    print(seeds_table(results))
    path = draw(results, Path(options.out) / "bracket_counting.png")
    print(f"drawn: {path}; {(time.process_time() - started) / 60:.1f} CPU minutes")


if __name__ == "__main__":
    with torch.no_grad(), report_errors():
        main(tyro.cli(Options))
