"""Which of the twenty tasks the dense and the sparse model of each run solve: a Markdown table, and RUN/metrics.json.

A folder of scripts/train_dense.py or scripts/train_sparse.py holds only one of them, which will do.

Example:
    python scripts/solved_tasks.py runs/demo
"""

from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm.auto import tqdm

from bridges.dense import load_gpt2
from bridges.run_folder import update_metrics
from interventions.circuits.node_model import NodeModel, as_nodes
from interventions.circuits.solved_tasks import SOLVED, TaskScore, score_tasks
from interventions.cli.options import report_errors
from sparse_model.config import require
from sparse_model.data.tokenizer import load_tokenizer
from sparse_model.model.checkpoint import load_sparse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which of the twenty tasks the dense and the sparse model of each run solve."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders."""
    pairs: int = 128
    """Evaluation pairs of each task."""
    seed: int = 0
    """Seeds the pairs."""


def main(options: Options) -> None:
    require(len(options.runs) > 0, "runs", options.runs, "name at least one run folder")
    scores = {}
    for folder in tqdm(options.runs, unit="run", leave=False):
        models = models_in(Path(folder))
        n_ctx = min(model.shape.n_ctx for model in models.values())
        tokenizer = load_tokenizer(Path(folder) / "tokenizer")
        found = score_tasks(models, tokenizer, max_tokens=n_ctx, pairs=options.pairs, seed=options.seed)
        scores[folder] = found
        update_metrics(
            Path(folder),
            tasks={
                name: {"unsupported": of} if isinstance(of, str) else {label: s._asdict() for label, s in of.items()}
                for name, of in found.items()
            },
        )
    print(table(scores))


def models_in(folder: Path) -> dict[str, NodeModel]:
    """The dense and the sparse model of a folder, or the one that it has. Raises FileNotFoundError for neither."""
    models: dict[str, NodeModel] = {}
    if (folder / "dense").is_dir():
        models["dense"] = as_nodes(load_gpt2(folder / "dense"))
    if (folder / "sparse").is_dir():
        models["sparse"] = as_nodes(load_sparse(folder / "sparse").eval())
    if not models:
        raise FileNotFoundError(f"{folder} has neither dense/ nor sparse/: name the folder of a finished training")
    return models


def table(scores: dict[str, dict[str, dict[str, TaskScore] | str]]) -> str:
    """Pair accuracy and P(right) of the models of each run, by task; solved ones are bold."""
    columns = [
        (folder, label)
        for folder, found in scores.items()
        for label in ("dense", "sparse")
        if any(not isinstance(of, str) and label in of for of in found.values())
    ]
    heads = ["task", *(f"{Path(folder).name} {label}: pairs, P(right)" for folder, label in columns)]
    lines, reasons = [heads, ["---"] * len(heads)], []
    for name in next(iter(scores.values())):
        found = [(scores[folder][name], label) for folder, label in columns]
        lines.append([name, *("-" if isinstance(of, str) else cell(of[label]) for of, label in found)])
        reasons += [f"{Path(run).name}: {of[name]}" for run, of in scores.items() if isinstance(of[name], str)]
    solved = [
        sum(of[label].solved for of in scores[folder].values() if not isinstance(of, str)) for folder, label in columns
    ]
    lines.append([f"solved: pairs at least {SOLVED:g}", *map(str, solved)])
    return "\n".join([f"| {' | '.join(line)} |" for line in lines] + [f"\nunsupported, {reason}" for reason in reasons])


def cell(score: TaskScore) -> str:
    """Pair accuracy and P(right) of a model."""
    accuracy = f"{score.pair_accuracy:.2f}"
    return f"{f'**{accuracy}**' if score.solved else accuracy}, {score.p_right:.2f}"


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))
