"""One small run against kills, second writers and full disks: nothing lost, left over or disturbed.

    python tests/kill_points.py --all                   # an hour and a half of one core
    python tests/kill_points.py --points 20 --kills 5   # a sample

points  SIGKILL right before a change of the file system (as Python's audit events tell them), then --resume
kills   SIGKILL at a random moment, then --resume
pairs   two processes that train in one folder, both anew or both resuming; then --resume
disks   a file system (tmpfs, where one may be mounted; otherwise files) of limited size, then --resume with enough

A run is lost where --resume does not end with the weights of the undisturbed one and its record; something is left over
where its folder or the cache then holds another name than the undisturbed one's.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path[:0] = [str(Path(__file__).parents[1])]

TRAIN = [
    "train-bridge",
    "tiny",
    "--steps",
    "5",
    "--batch-size",
    "2",
    "--checkpoint-every",
    "2",
    "--log-every",
    "2",
    "--corpus-tokens",
    "4000",
    "--eval-tokens",
    "96",
    "--sparse.d-model",
    "16",
    "--sparse.d-mlp",
    "32",
    "--sparse.n-heads",
    "2",
    "--sparse.d-head",
    "8",
    "--sparse.n-ctx",
    "24",
    "--sparse.d-vocab",
    "300",
    "--sparsity.nonzero-fraction",
    "0.25",
    "--dense-train.d-model",
    "16",
    "--dense-train.steps",
    "5",
    "--dense-train.batch-size",
    "2",
]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.link")
DISK_SENTENCE, IN_USE = "could not be written", "is in use by"


def start(work: Path, *extra: str, before: Callable[[], None] = lambda: None) -> int:
    """The command in a forked process, its run, cache and output below `work`; returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code: Any = 1
    try:
        said = os.open(work.parent / f"{work.name}.said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ["SPARSE_BRIDGES_CACHE"] = str(work / "cache")
        before()
        from interventions.cli.main import main

        main([*TRAIN, "--run", str(work / "run"), *extra])
        (work.parent / "modules").write_text(" ".join(sys.modules))
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def said(work: Path) -> str:
    path = work.parent / f"{work.name}.said"
    text = path.read_text()
    path.unlink()
    return text


def at_change(work: Path, number: int, counted: Path) -> Callable[[], None]:
    """Kill this process before its n-th change of the file system below `work`; 0 only counts them."""

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event == "open":
            path, _, flags = arguments
            if not flags & WRITES or not str(path).startswith(str(work)):
                return
        elif event not in CHANGES or not any(
            str(a).startswith(str(work)) or a == os.path.basename(str(a)) for a in arguments[:1]
        ):
            return
        seen += 1
        if number == 0:
            counts.seek(0)
            counts.write(str(seen))
            counts.flush()
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    seen = 0
    counts = counted.open("w")
    return lambda: sys.addaudithook(hook)


def names(work: Path) -> set[str]:
    return {path.relative_to(work).as_posix() for path in work.rglob("*")}


def weights(work: Path) -> dict[str, str]:
    files = ("run/sparse/model.safetensors", "run/bridges/bridges.safetensors", "run/dense/model.safetensors")
    return {name: sha256((work / name).read_bytes()).hexdigest() for name in files}


class Expected:
    """The undisturbed run."""

    def __init__(self, base: Path) -> None:
        self.base, work = base, base / "undisturbed"
        work.mkdir()
        count = base / "count"
        child = start(work, before=at_change(work, 0, count))
        assert wait(child) == 0, said(work)
        self.points = int(count.read_text())
        for name in (base / "modules").read_text().split(" "):  # once, and not in every fork
            with suppress(Exception):
                import_module(name)
        begun = time.monotonic()
        timed = base / "timed"
        timed.mkdir()
        assert wait(start(timed)) == 0, said(timed)
        self.seconds = time.monotonic() - begun
        self.weights, self.names = weights(work), names(work)
        self.size = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
        assert weights(timed) == self.weights, "the same command gives other weights"

    def judge(self, work: Path) -> list[str]:
        """What is wrong once a disturbed run has been resumed."""
        code, output = wait(start(work, "--resume")), said(work)
        if code:
            return [f"lost: --resume ends with {code}: {output.strip().splitlines()[-1]}"]
        wrong = [] if weights(work) == self.weights else ["lost: other weights"]
        metrics = json.loads((work / "run" / "metrics.json").read_text())
        wrong += [f"lost: no {part} in metrics.json" for part in ("training", "sites") if part not in metrics]
        if extra := names(work) - self.names:
            wrong.append(f"left over: {sorted(extra)}")
        if missing := self.names - names(work):
            wrong.append(f"lost: {sorted(missing)}")
        return wrong


def point(expected: Expected, work: Path, number: int) -> list[str]:
    """Kill before a change of the file system."""
    before = at_change(work, 1 + number % expected.points, expected.base / "count")
    code, output = wait(start(work, before=before)), said(work)
    if code != -signal.SIGKILL:
        return [f"ended with {code} before it was killed: {output}"]
    return expected.judge(work)


def kill(expected: Expected, work: Path, number: int) -> list[str]:
    """Kill at a random moment."""
    kill_within(expected, work, random.Random(number).uniform(0, 1))
    return expected.judge(work)


def kill_within(expected: Expected, work: Path, share: float) -> None:
    child = start(work)
    time.sleep(share * expected.seconds)
    os.kill(child, signal.SIGKILL)
    wait(child)
    said(work)


def pair(expected: Expected, work: Path, number: int) -> list[str]:
    """Two writers at once: one ends well, the other, unless it comes after, is told who it is."""
    rng, extra = random.Random(number), []
    if number % 2:  # both go on with what was killed
        extra = ["--resume"]
        kill_within(expected, work, rng.uniform(0.3, 1))
    first = start(work, *extra)
    time.sleep(rng.choice((0, 0, rng.uniform(0, expected.seconds))))
    codes = sorted(wait(child) for child in (start(work, *extra), first))
    output = said(work)
    told = IN_USE in output or "already holds a run" in output
    if codes not in ([0, 0], [0, 2]) or (2 in codes and not told) or "Traceback" in output:
        return [f"exit codes {codes}: {output}"]
    return expected.judge(work)


def disk(expected: Expected, work: Path, number: int) -> list[str]:
    """A size between 8 KiB and a little less than the run takes; 32 of them, evenly in their logarithm."""
    size = int(8192 * (0.95 * expected.size / 8192) ** (number % 32 / 31))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(work)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    limit = resource.RLIM_INFINITY if mounted else size
    try:
        code = wait(start(work, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
        output = said(work)
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", str(work)], check=True)
        lines = [line for line in output.replace("\r", "\n").splitlines() if line.startswith("error:")]
        sentence = "Traceback" not in output and len(lines) == 1 and DISK_SENTENCE in lines[0]
        if not sentence and (code or mounted):  # a limit on files may be large enough
            return [f"{size} bytes, ended with {code} and no single sentence: {output}"]
        return expected.judge(work)
    finally:
        if mounted:
            subprocess.run(["umount", str(work)], check=True)


ATTACKS = {"points": point, "kills": kill, "pairs": pair, "disks": disk}
ALL = {"points": 10**6, "kills": 50, "pairs": 30, "disks": 32}


def attack(name: str, expected: Expected, count: int, seconds: float) -> list[str]:
    """`count` attacks of a kind, or as many as begin within so many seconds, evenly spread over all there are."""
    whole = {"points": expected.points, "disks": 32}.get(name, count)
    numbers = [i * whole // count for i in range(count)] if count < whole else list(range(whole))
    random.Random(0).shuffle(numbers)
    wrong, done, begun = [], 0, time.monotonic()
    for number in numbers:
        if time.monotonic() - begun > seconds:
            break
        work = Path(tempfile.mkdtemp(dir=expected.base))
        found = [f"{name} {number}: {one}" for one in ATTACKS[name](expected, work, number)]
        print("\n".join([f"{name} {number}: " + ("wrong" if found else "right"), *found]), flush=True)
        wrong += found
        done += 1
        shutil.rmtree(work)
    print(f"{name}: {done} of {whole}, {len(wrong)} wrong", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every point, 50 kills, 30 pairs, 32 disks")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each kind, at most")
    for name in ATTACKS:
        parser.add_argument(f"--{name}", type=int, default=0)
    options = vars(parser.parse_args())
    options |= ALL if options["all"] else {}
    import torch

    import interventions.cli.train_bridge  # noqa: F401

    torch.set_num_threads(1)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as base:
        expected = Expected(Path(base))
        print(f"undisturbed: {expected.seconds:.1f} s, {expected.points} changes of the file system", flush=True)
        for name in ATTACKS:
            if options[name]:
                wrong += attack(name, expected, options[name], options["seconds"])
    print(f"{len(wrong)} wrong" if wrong else "nothing lost, left over or disturbed")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
