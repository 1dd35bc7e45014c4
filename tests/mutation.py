"""Mutation run over the maths: small faults are put into the code, one at a time, and the tests must notice each.

    python tests/mutation.py             # goes on where it stopped, and tries again what no test noticed
    python tests/mutation.py --report    # what is known so far; it is kept in .mutation.jsonl

1. Every place of the modules below where an operator, comparison, constant, condition or call could be wrong is listed.
2. A fixed share of them is drawn: those whose digests are the smallest, so that the draw outlives edits elsewhere.
3. Each mutant is written into a copy of the last commit; the module's own tests run there until the first failure, in
   a fork of one process that has the libraries loaded.

What no test can notice stands in EQUIVALENT, with the reason.
"""

import ast
import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
STATE = ROOT / ".mutation.jsonl"
PER_MODULE = 10
"""Mutants drawn in each module, or all where it has fewer."""
PATIENCE = 10
"""A mutant whose tests take so many times longer than without it, and a minute, does not end: it is caught."""

_EDITING = [f"tests/interventions/editing/test_{name}.py" for name in ("intervene", "handle", "hf", "generation")]
TESTS = {
    "bridges/losses.py": ["tests/bridges/test_losses.py", "tests/bridges/test_hybrid.py"],
    "bridges/chunked_logits.py": ["tests/bridges/test_chunked_logits.py"],
    "sparse_model/training/losses.py": ["tests/bridges/test_losses.py"],
    "interventions/editing/hooks.py": _EDITING,
    "interventions/editing/vectors.py": _EDITING,
    "interventions/editing/positions.py": _EDITING,
    "sparse_model/sparsity/projection.py": [
        "tests/sparse_model/sparsity/test_projection.py",
        "tests/sparse_model/sparsity/test_model_projection.py",
    ],
    "sparse_model/sparsity/abs_topk.py": [
        "tests/sparse_model/sparsity/test_topk.py",
        "tests/sparse_model/training/test_compile.py",
    ],
    "sparse_model/sparsity/topk.py": [
        "tests/sparse_model/sparsity/test_topk.py",
        "tests/sparse_model/sparsity/test_projection.py",
    ],
    "sparse_model/sparsity/topk_torch.py": [
        "tests/sparse_model/sparsity/test_topk.py",
        "tests/sparse_model/sparsity/test_projection.py",
    ],
    "sparse_model/sparsity/sparse_linear.py": ["tests/sparse_model/sparsity/test_sparse_linear.py"],
    "bridges/scales.py": ["tests/bridges/test_evaluation.py"],
    "bridges/evaluation.py": ["tests/bridges/test_evaluation.py"],
}

_ROWS = "only how many rows are taken at once: the same sums"
_FLAT, _LAYOUT = "x.reshape(-1, x.shape[-1])", "the kernels read every layout, only slower"
_GPU = "on a GPU only"
EQUIVALENT: dict[str, str] = {
    "bridges/evaluation.py Moments.add: self.error + error.sum(0) -> self.error - error.sum(0)": (
        "the sum of all errors is only ever squared"
    ),
    "bridges/scales.py measure_scales: batch.long().to(bridges.rms_dense.device) -> batch.long()": (
        "the same device where there is no GPU"
    ),
    "interventions/editing/positions.py _in_mask: 0 -> 1 #3": "one more column of padding, which the slice cuts off",
    "sparse_model/sparsity/topk.py top_mask_forced: x.detach() -> x": "a view as integers has no gradient anyway",
    "sparse_model/sparsity/topk.py top_mask_forced: x.detach().contiguous() -> x.detach()": _LAYOUT,
    "sparse_model/sparsity/topk.py keep_masked: 1 -> 2 #1": "numpy takes every negative length for -1",
    f"sparse_model/sparsity/abs_topk.py _compiled: {_FLAT}.contiguous() -> {_FLAT}": _LAYOUT,
    "sparse_model/sparsity/topk_torch.py count_digits: 4 -> 5": "a type has 2, 4 or 8 bytes; asked on a GPU only",
    "sparse_model/sparsity/topk_torch.py narrow: triton.narrow(counts, threshold, room, shift) -> "
    "triton.narrow(threshold, counts, room, shift)": _GPU,
    "sparse_model/sparsity/topk.py top_mask_flat: 0 -> 1 #1": _GPU,
    "sparse_model/sparsity/topk.py top_mask_flat: counting.flat_masks(magnitude_bits(x)[None], k) -> "
    "counting.flat_masks(k, magnitude_bits(x)[None])": _GPU,
    "sparse_model/sparsity/projection.py project_: _MOST_TOGETHER // math.prod(shape) -> "
    "_MOST_TOGETHER * math.prod(shape)": _GPU,
    "sparse_model/sparsity/projection.py project_: tensors[0].device.type != 'cpu' -> "
    "not tensors[0].device.type != 'cpu'": "one after the other or together, the masks are the same",
    "bridges/losses.py nmse_backward_together: (x - y).square().sum((1, 2)) -> (x - y).square().mean((1, 2))": (
        "error and spread are divided by the same number, which their quotient does not see"
    ),
    "sparse_model/sparsity/sparse_linear.py multiply: len(matrix.values) // 8 -> len(matrix.values) * 8": (
        "only on how many threads the same rows are multiplied"
    ),
    "bridges/losses.py : 1 << 18 -> 1 >> 18": _ROWS,
    "bridges/losses.py _KL.forward: logits.device.type == 'cpu' -> logits.device.type != 'cpu'": _ROWS,
    "bridges/losses.py _KL.forward: 1 -> 2": _ROWS + ", and only beyond 2^18 tokens of vocabulary",
}
"""Mutants (by name) that compute the same, or whose code runs on a GPU only, with the reason."""

OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OTHER_NAME = {"min": "max", "max": "min", "mean": "sum", "sum": "mean", "any": "all", "all": "any", "var": "std"}
COMMUTATIVE = {"min", "max", "promote_types", "equal", "_equal"}
DROPPED = {"detach", "abs", "square", "sqrt", "clone", "contiguous", "clamp", "exp", "exp_", "log", "mean", "cumsum",
           "flip", "double", "float", "copy", "to", "sum", "any", "expand_as"}  # fmt: skip


class Mutant(NamedTuple):
    """One fault."""

    module: str
    function: str
    old: str
    new: str
    occurrence: int
    """Among the same faults of the function."""
    source: str
    """The whole module with the fault."""

    @property
    def name(self) -> str:
        again = f" #{self.occurrence}" if self.occurrence else ""
        return f"{self.module} {self.function}: {self.old} -> {self.new}{again}"

    @property
    def order(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()


def faults(node: ast.AST) -> Iterator[ast.AST]:
    """What could stand in the place of an expression or condition by mistake."""
    wrong = copy.deepcopy(node)
    match wrong:
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            wrong.op = OPERATORS[type(op)]()
            yield wrong
        case ast.Compare(ops=[op, *_]) if type(op) in COMPARISONS:
            wrong.ops[0] = COMPARISONS[type(op)]()
            yield wrong
        case ast.BoolOp(op=op):
            wrong.op = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield wrong
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not wrong.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(wrong.value + 1)
        case ast.IfExp():
            wrong.body, wrong.orelse = wrong.orelse, wrong.body
            yield wrong
        case ast.Call():
            yield from _wrong_calls(wrong)


def _wrong_calls(call: ast.Call) -> Iterator[ast.AST]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if isinstance(call.func, ast.Attribute) and name in DROPPED:
        yield call.func.value
    if name in OTHER_NAME:
        other = copy.deepcopy(call)
        setattr(other.func, "attr" if isinstance(call.func, ast.Attribute) else "id", OTHER_NAME[name])
        yield other
    if len(call.args) >= 2 and name not in COMMUTATIVE and not any(isinstance(a, ast.Starred) for a in call.args[:2]):
        swapped = copy.deepcopy(call)
        swapped.args[:2] = swapped.args[1::-1]
        yield swapped


class _Places(ast.NodeVisitor):
    """The nodes that may be mutated, with their functions; not annotations, messages and progress bars."""

    def __init__(self) -> None:
        self.function: list[str] = []
        self.found: list[tuple[str, ast.expr, bool]] = []

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
            return
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.function.append(node.name)
            for child in node.body:
                self.visit(child)
            self.function.pop()
            return
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "progress_bar":
            return
        if isinstance(node, ast.keyword) and node.arg == "strict":
            return
        if isinstance(node, ast.AnnAssign):
            if node.value:
                self.visit(node.value)
            return
        if (
            not self.function
            and isinstance(node, ast.Assign)
            and " | " in ast.unparse(node.value) + " | " * isinstance(node.value, ast.Subscript)
        ):
            return  # the name of a type
        if isinstance(node, ast.If | ast.While):
            self.found.append((".".join(self.function), node.test, True))
        if isinstance(node, ast.expr):
            self.found.append((".".join(self.function), node, False))
        self.generic_visit(node)


def mutants_of(module: str) -> list[Mutant]:
    """All mutants of a module in the order of their digests."""
    text = (ROOT / module).read_text()
    places = _Places()
    places.visit(ast.parse(text))
    lines = text.encode().splitlines(keepends=True)
    starts = [sum(map(len, lines[:n])) for n in range(len(lines))]
    seen: Counter[tuple[str, str, str]] = Counter()
    mutants = []
    for function, node, is_condition in places.found:
        wrong_nodes = [ast.UnaryOp(ast.Not(), node)] if is_condition else list(faults(node))
        for wrong in wrong_nodes:
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            old, new = ast.unparse(node), ast.unparse(wrong)
            source = (text.encode()[:start] + f"({new})".encode() + text.encode()[end:]).decode()
            if _unchanged(source, text):
                continue
            key = (function, old, new)
            mutants.append(Mutant(module, function, old, new, seen[key], source))
            seen[key] += 1
    return sorted(mutants, key=lambda m: m.order)


def _unchanged(source: str, text: str) -> bool:
    try:
        return ast.dump(ast.parse(source)) == ast.dump(ast.parse(text))
    except SyntaxError:
        return True


def copy_tree(folder: Path) -> None:
    """The last commit."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)


def run_tests(folder: Path, tests: list[str], seconds: float) -> int:
    """Exit code of the tests in a fork of this process; 99 where they do not end in time."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        import pytest

        os.setsid()
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = str(folder)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(int(pytest.main(["-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])))
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 99
        time.sleep(0.05)


def read_state() -> dict[str, str]:
    if not STATE.exists():
        return {}
    return {r["mutant"]: r["outcome"] for r in map(json.loads, STATE.read_text().splitlines())}


def report(drawn: list[Mutant], state: dict[str, str]) -> None:
    """The table of outcomes, and every mutant that is left."""
    of = {m.name: "equivalent" if m.name in EQUIVALENT else state.get(m.name, "not run") for m in drawn}
    print(f"{'module':42} mutants  caught  equivalent  survived  not run")
    for module in [*TESTS, ""]:
        counts = Counter(of[m.name] for m in drawn if m.module.startswith(module))
        row = [counts[n] for n in ("caught", "equivalent", "survived", "not run")]
        print(f"{module or 'all':42} {sum(row):7} {row[0]:7} {row[1]:11} {row[2]:9} {row[3]:8}")
    for m in drawn:
        if of[m.name] == "survived":
            print("survived:", m.name)
    alive = Counter(of.values())
    judged = alive["caught"] + alive["survived"]
    print(f"caught: {alive['caught']} of {judged} that can be ({alive['caught'] / max(1, judged):.1%})")


def main() -> None:
    state = read_state()
    drawn = [m for module in TESTS for m in mutants_of(module)[:PER_MODULE]]
    if "--report" in sys.argv:
        return report(drawn, state)
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")]
    import accelerate, datasets, numba, torch, transformer_lens, transformers  # noqa: E401, F401, I001

    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        copy_tree(folder)
        for module, tests in TESTS.items():
            tests = [test for test in tests if (folder / test).exists()]
            of_module = [m for m in drawn if m.module == module and m.name not in EQUIVALENT]
            left = [m for m in of_module if state.get(m.name) != "caught"]
            whole, start = (folder / module).read_text(), time.monotonic()
            if left and (code := run_tests(folder, tests, 3600)):
                print(f"the tests of {module} fail without any mutant (exit code {code})", flush=True)
                continue
            patience = 60 + PATIENCE * (time.monotonic() - start)
            print(f"{module}: {time.monotonic() - start:.1f} s without a mutant", flush=True)
            for mutant in left:
                start = time.monotonic()
                (folder / module).write_text(mutant.source)
                code = run_tests(folder, tests, patience)
                state[mutant.name] = "caught" if code else "survived"
                record = {"mutant": mutant.name, "outcome": state[mutant.name], "seconds": time.monotonic() - start}
                with STATE.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"{record['seconds']:6.1f} s  {state[mutant.name]:8}  {mutant.name}", flush=True)
            (folder / module).write_text(whole)
    report(drawn, state)


if __name__ == "__main__":
    main()
