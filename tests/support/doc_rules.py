"""What `tests/doc_commands.py` cuts each kind of documented command down to, and what it does not run."""

import re
from collections.abc import Callable
from typing import NamedTuple

TRAINS = r"(?:sparse-bridges |.*scripts/|.*interventions\.cli )train[-_](?:bridge|sparse|dense)(?:\.py)?(?= |$)"
TRAINING = (
    "--steps 3 --batch-size 2 --corpus-tokens 4000 --eval-tokens 64 --log-every 1 --checkpoint-every 1 "
    "--sparse.d-model 16 --sparse.d-mlp 32 --sparse.n-heads 2 --sparse.d-head 8 --sparse.n-ctx 24 "
    "--sparsity.min-per-neuron 0"
)
OWN_DENSE = "--dense-train.d-model 16 --dense-train.n-heads 2 --dense-train.steps 3 --dense-train.batch-size 2"
PRUNING = "--steps 2 --pairs 4 --pool 8 --selection-pairs 4 --reference-tokens 256 --lbfgs-steps 2 --no-eliminate"


class Rule(NamedTuple):
    """How a kind of command is cut down; all rules that match are applied, in their order."""

    kind: str
    """Regular expression that the command begins with."""
    change: str | Callable[[str], str]
    """Options put at its end, where they win over earlier ones; or what replaces the command."""


def replacing(old: str, new: str) -> Callable[[str], str]:
    return lambda command: re.sub(old, new, command)


RULES = (
    # Several processes: two, on this machine's processor.
    Rule(r"(?:accelerate|torchrun) ", replacing(r"(--num_processes|--nproc_per_node|--processes) \d+", r"\1 2")),
    Rule(r"torchrun --nnodes 2", replacing(r"--nnodes 2", "--nnodes 1")),
    Rule(
        r"accelerate .*two-nodes",
        replacing(r"--machine_rank n", "--num_machines 1 --num_processes 2 --machine_rank 0"),
    ),
    Rule(r"(?:accelerate|torchrun) ", replacing("HOST_OF_NODE_0", "127.0.0.1")),
    Rule(r"(?:accelerate|torchrun) ", replacing("SHARED/FOLDER", "runs/shared")),
    # Models and text of the hub: those of the stand-in, which holds no data sets.
    Rule(TRAINS + r" gpt2(?! --dense)", "--dense local/gpt2 --corpus generated"),
    Rule(TRAINS, replacing(r"--dense (gpt2\S*)", r"--dense local/\1")),
    Rule(TRAINS, replacing(r"--corpus codeparrot/\S+", "--corpus generated")),
    # Trainings: small, and short.
    Rule(TRAINS + r"(?!.* --help)", TRAINING),
    Rule(r".*train[-_](?:bridge|dense)(?!.* --(?:help|dense) )(?!.* --help)", OWN_DENSE),
    Rule(TRAINS + r"(?!.* --(?:dense|tokenizer|help)(?: |$))", "--sparse.d-vocab 300"),
    # The sparse model that a training begins with is a packaged one, of its preset's shape.
    Rule(TRAINS + r".* --start-from ", replacing(r" --sparse\.\S+ \S+", "")),
    # One that begins as the dense model has its shape.
    Rule(
        TRAINS + r" code(?= |$)",
        replacing(r" --(?:sparse\.(?!d-vocab|n-ctx)|dense-train\.(?:d-model|n-heads))\S* \S+", ""),
    ),
    # What looks at a run: few pairs, draws and steps.
    Rule(r"sparse-bridges find-channel(?!.* --help)", "--pairs 4 --site 1"),
    Rule(r"sparse-bridges find-channel.* --from circuit", replacing(r" --site 1$", "")),
    Rule(
        r"sparse-bridges steer",
        "--pairs 2 --draws 2 --maps 2 --searches 2 --resamples 5 --ridge-tokens 256 --text-tokens 64 --task-pairs 1 "
        "--new-tokens 2",
    ),
    Rule(
        r"sparse-bridges compare-bases",
        "--pairs 2 --draws 2 --sizes 1 --kept 2 --coder-tokens 256 --ridge-tokens 256 --text-tokens 64 --task-pairs 1 "
        "--new-tokens 2",
    ),
    Rule(r"sparse-bridges find-circuit", f"--evaluation-pairs 4 --draws 2 --target-loss 0.5 {PRUNING}"),
    Rule(r"sparse-bridges find-circuit.*--search", replacing(r"--search \d+", "--search 1 --seeds 1")),
    Rule(r"sparse-bridges (?:check-task|solved-tasks)", "--pairs 4"),
    Rule(r"sparse-bridges evaluate", "--tokens 128"),
    Rule(r"sparse-bridges halve", replacing("--out ", "--out halved/")),
    Rule(r"sparse-bridges serve", "--port 0"),
    # Studies and benchmarks.
    Rule(
        r"python scripts/studies/circuit_size\.py",
        f"--tasks single_double_quote --levels 0.6 --draws 2 --target-loss 0.5 {PRUNING}",
    ),
    Rule(r"python scripts/studies/prune_settings\.py", f"--draws 1 --target-loss 0.5 {PRUNING}"),
    Rule(
        r"python scripts/studies/dense_start\.py",
        "--corpus generated --corpus-tokens 20000 --widths 64 --topk 0.5 --kept 0.5 --eval-tokens 512",
    ),
    Rule(r"python scripts/studies/dense_start\.py", replacing("runs/code/dense", "demo")),
    Rule(r"python scripts/studies/worst_case\.py", f"--target-loss 0.5 {PRUNING}"),
    Rule(r"python scripts/studies/prediction\.py", "--channels 4 --rows 4 --draws 2"),
    # It takes text behind what a run is measured on; the runs made here have no more.
    Rule(r"python scripts/studies/prediction\.py", replacing("--run runs/stdlib", "--run demo")),
    Rule(
        r"python scripts/studies/bracket_counting\.py",
        replacing("bracket_counting.py .*", "bracket_counting.py runs/bundle --pairs 2 --draws 1 --numbers 3 4"),
    ),
    Rule(
        r"python scripts/studies/variable_binding\.py",
        replacing("variable_binding.py .*", "variable_binding.py runs/bundle --pairs 2 --draws 1"),
    ),
    Rule(r"python scripts/studies/compare_objectives\.py", "--seconds 1 --seeds 0"),
    Rule(
        r"python scripts/studies/frontier\.py",
        "--steps 2 --seeds 0 --rates 8e-3 --widths 32 --nonzeros 4096 --jobs 1",
    ),
    Rule(
        r"python scripts/bench/step\.py",
        "--layers 1 --d-dense 16 --d-sparse 128 --d-head 16 --vocab 64 --ctx 16 --batch 2 --sites 1",
    ),
    Rule(r"python scripts/bench/kernels\.py", "--repeats 1"),
    Rule(r"python scripts/bench/kernels\.py", replacing("--device cuda", "--device cpu")),
    Rule(r"python scripts/bench/gpu\.py", "--device cpu --quick"),
    Rule(r"python tests/kill_points\.py", replacing("--all", "--points 1")),
)

NOT_RUN = {
    r"pip install": "installs packages, from a network",
    r"make (?:test|check)": "the suite itself, and what CI runs besides",
    r"make (?:lock|newest|audit)": "installs or asks for packages, over a network",
    r"accelerate launch (?:--quiet --config_file scripts/accelerate\.yaml|--cpu --num_processes 2)$": "a part of one",
    r"sparse-bridges package-bundle": "writes into the package itself",
    r"python scripts/bench/released\.py": "a gigabyte of weights: the shapes are those of released checkpoints",
    r"python scripts/studies/compare_objectives\.py": "starts whole trainings, which no option of it cuts",
}
"""By what a command begins with: why it is not run."""
