"""Damaged and hostile copies of a run: each reading ends as with the whole one, or in one sentence of ours.

    python tests/damaged_files.py --copies 2000    # an hour of one core
    python tests/damaged_files.py --copies 40      # a sample

Each copy has one file changed: bits flipped, cut, types exchanged, numbers absurd, nested deeply, keys renamed or
twice, another run's file in its place. Half of the copies are of a run with digests, half of one as earlier versions
wrote it, in which another number of the right type cannot be noticed: there another result is counted apart.

    same     the result of the whole run          named    one error whose text names the file or the channel
    other    another result, without a word       trace    an error of another type, or one that a library worded
    hang     longer than its limit                memory   more than 2 GB above what the libraries take
    ended    the process died                     ran      code from a file was run
"""

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.damage import change  # noqa: E402

SECONDS, MEMORY = 60, 2 * 10**9
OURS = (ValueError, FileNotFoundError, KeyError)
PACKAGES = tuple(str(ROOT / name) for name in ("sparse_model", "bridges", "interventions"))
ALLOWED = ("same", "named", "other without digests")


def build(folder: Path, seed: int) -> None:
    """A run with every part, a saved handle, and a model in OpenAI's format."""
    import torch
    from support.helpers import make_tiny_run
    from support.report_runs import full_run

    from bridges.run_folder import write_digests
    from interventions import intervene, load_dense
    from sparse_model.config import SparseConfig
    from sparse_model.model.openai_format import to_openai
    from sparse_model.model.transformer import SparseTransformer

    torch.manual_seed(seed)
    if seed:
        make_tiny_run(folder, seed=seed)
    else:
        full_run(folder)
    write_digests(folder)
    dense = load_dense(folder)
    tokens = torch.randint(0, 300, (1, 12))
    handle = intervene(dense, "mlp.0.read.3", toward=tokens) + intervene(
        dense, "attn.1.read.7", delta=0.5, positions=[1]
    )
    handle.save(folder / "handle")
    shape = SparseConfig(
        n_layers=1, d_model=16, d_mlp=32, n_heads=2, d_head=8, n_ctx=16, d_vocab=64, positions="learned"
    )
    to_openai(SparseTransformer(shape), folder / "openai")


def as_earlier(folder: Path) -> None:
    """Take away every digest of the files' own content."""
    (folder / "digests.json").unlink(missing_ok=True)
    places = [folder / "channels.json", folder / "metrics.json", *folder.glob("circuits/*.json")]
    for path in (path for path in [*places, folder / "handle" / "intervention.json"] if path.exists()):
        data = json.loads(path.read_text())
        data.pop("sha256", None)
        for entry in data.values() if path.name == "channels.json" else ():
            entry.pop("digest")
        path.write_text(json.dumps(data, indent=1))


# What is read, each as text that is the same for the same result.


def digest(*parts: Any) -> str:
    import torch

    sha = hashlib.sha256()
    for part in parts:
        sha.update(
            part.detach().contiguous().numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode()
        )
    return sha.hexdigest()


def model_digest(dense: Any) -> str:
    import torch

    with torch.no_grad():
        out = dense(torch.arange(12)[None])
    bundle = dense.bundle
    return digest(getattr(out, "logits", out), bundle.channels, bundle.shape, *bundle.bridges.state_dict().values())


def read_run(folder: Path) -> str:
    from bridges.run_folder import fingerprint, open_run
    from sparse_model.data.tokenizer import tokenizer_fingerprint

    run = open_run(folder)
    return digest(fingerprint(run), run.config, run.sparse.cfg, tokenizer_fingerprint(run.tokenizer))


def read_dense(folder: Path) -> str:
    from interventions import load_dense

    return model_digest(load_dense(folder))


def read_hf(folder: Path) -> str:
    from interventions import load_hf

    return model_digest(load_hf(folder))


def read_channels(folder: Path) -> str:
    from interventions import load_channels

    return digest({name: vars(channel) for name, channel in load_channels(folder).items()})


def read_circuit(folder: Path) -> str:
    from bridges.run_folder import open_run
    from interventions import load_circuit

    circuit = load_circuit(open_run(folder), "single_double_quote")
    plain = {name: value for name, value in vars(circuit).items() if name != "ablation"}
    return digest(plain, circuit.ablation.kind, *circuit.ablation.values.values())


def read_handle(folder: Path) -> str:
    import torch

    from interventions import Intervention, load_hf

    dense = load_hf(folder)
    with torch.no_grad(), Intervention.load(folder / "handle", dense):
        return digest(dense(torch.arange(12)[None]).logits)


def read_openai(folder: Path) -> str:
    from sparse_model.model.openai_format import from_openai

    model = from_openai(folder / "openai")
    return digest(model.cfg, *model.state_dict().values())


def read_report(folder: Path) -> str:
    from interventions import write_report

    html = write_report(folder).read_text()
    left_out = re.search(r"A circuit is left out: .*?circuits/[^<]*", html)
    return f"says {left_out[0]}" if left_out else digest(html)


READERS: dict[str, Callable[[Path], str]] = {
    "open_run": read_run,
    "load_dense": read_dense,
    "load_hf": read_hf,
    "load_channels": read_channels,
    "load_circuit": read_circuit,
    "handle": read_handle,
    "openai": read_openai,
    "report": read_report,
}


def readers_of(name: str) -> list[str]:
    """Which of them read a file; the quicker ones more often."""
    first = name.split("/")[0]
    if first in ("openai", "handle"):
        return [first]
    if first == "channels.json":
        return ["load_channels"] * 4 + ["load_hf", "report"]
    if first == "circuits":
        return ["load_circuit"] * 4 + ["report"]
    if first.startswith("metrics"):
        return ["report"]
    return ["open_run"] * 4 + ["load_hf"] * 2 + ["load_dense", "load_circuit", "handle", "report"]


# One reading, in a process of its own.


def attempt(name: str, folder: Path, said: Path) -> tuple[str, str]:
    """What reading ended as, and what it gave or said."""
    child = os.fork()
    if not child:
        _read(name, folder, said)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(3 * SECONDS)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(0)
    text = said.read_text() if said.exists() else ""
    said.unlink(missing_ok=True)
    if code in (-signal.SIGKILL, -signal.SIGXCPU):
        return "hang", text
    kind, _, words = text.partition("\n")
    return (kind, words) if code == 0 and kind else ("ended", f"exit code {code}")


def _read(name: str, folder: Path, said: Path) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        said.write_text(f"result\n{READERS[name](folder)}")
    except MemoryError:
        said.write_text("memory\n")
    except BaseException as error:
        said.write_text(f"{_judged(error, folder)}\n{type(error).__name__}: {error}\n{traceback.format_exc()}")
    finally:
        os._exit(0)


def _judged(error: BaseException, folder: Path) -> str:
    if "can't allocate memory" in str(error):
        return "memory"
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = isinstance(error, OURS) and where.startswith(PACKAGES)
    names = str(folder) in str(error) or "channel" in str(error)
    return "named" if ours and names and "\n" not in str(error) else "trace"


def files_of(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != "report.html" and not name.endswith((".py", ".jinja")))


def run(copies: int, seed: int, work: Path, verbose: bool) -> Counter[str]:
    """Try so many copies; prints every outcome that must not be."""
    os.environ["SPARSE_BRIDGES_CACHE"] = str(work / "cache")
    whole, other, counts = work / "whole", work / "other", Counter[str]()
    for folder, number in ((whole, 0), (other, 1)):
        build(folder, number)
    shutil.copytree(whole, work / "earlier")
    as_earlier(work / "earlier")
    target = work / "copy"  # always of this name, which stands in the report
    wanted = {}
    for name in READERS:
        shutil.copytree(whole, target)
        wanted[name] = attempt(name, target, work / "said")
        shutil.rmtree(target)
        assert wanted[name][0] == "result", (name, wanted[name])
    for number in range(copies):
        rng = random.Random(f"{seed} {number}")
        source = rng.choice(["whole", "earlier"])
        shutil.copytree(work / source, target)
        groups: dict[str, list[str]] = {}
        for file in files_of(target):
            groups.setdefault(file.split("/")[0], []).append(file)
        file = rng.choice(groups[rng.choice(sorted(groups))])
        kind = change(target / file, other / file, work / "marker", rng)
        name = rng.choice(readers_of(file))
        outcome, words = attempt(name, target, work / "said")
        if outcome == "result":
            outcome = "same" if words == wanted[name][1] else "named" if words.startswith("says ") else "other"
        if outcome == "other" and (source == "earlier" or file.split("/")[0] in ("openai", "metrics.jsonl")):
            outcome = "other without digests"
        if (work / "marker").exists():
            (work / "marker").unlink()
            outcome = "ran"
        counts[outcome] += 1
        if outcome not in ALLOWED or verbose:
            print(f"{number} {source} {file} {kind} {name}: {outcome}\n{words}", flush=True)
        shutil.rmtree(target)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        counts = run(options.copies, options.seed, Path(work).resolve(), options.verbose)
    print(", ".join(f"{outcome} {count}" for outcome, count in counts.most_common()))
    sys.exit(any(outcome not in ALLOWED for outcome in counts))


if __name__ == "__main__":
    main()
