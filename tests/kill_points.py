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
from hashlib import sha256
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
DISK_SENTENCE, IN_USE = "could not be written", "is in use by process"


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
        begun = time.monotonic()
        timed = base / "timed"
        timed.mkdir()
        assert wait(start(timed)) == 0, said(timed)
        self.seconds = time.monotonic() - begun
        self.weights, self.names = weights(work), names(work)
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

    def work(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.base))


def points(expected: Expected, count: int) -> list[str]:
    """Kill before `count` of the changes, evenly spread."""
    count = min(count, expected.points)
    wrong = []
    for number in sorted({1 + i * expected.points // count for i in range(count)}):
        work = expected.work()
        code = wait(start(work, before=at_change(work, number, expected.base / "count")))
        said(work)
        found = expected.judge(work) if code == -signal.SIGKILL else [f"ended with {code} before it was killed"]
        wrong += [f"kill point {number}: {one}" for one in found]
        shutil.rmtree(work)
    print(f"{count} of {expected.points} kill points")
    return wrong


def kills(expected: Expected, count: int) -> list[str]:
    """Kill at random moments."""
    rng, wrong, killed = random.Random(0), [], 0
    for number in range(count):
        work = expected.work()
        child = start(work)
        time.sleep(rng.uniform(0, expected.seconds))
        os.kill(child, signal.SIGKILL)
        killed += wait(child) == -signal.SIGKILL
        said(work)
        wrong += [f"random kill {number}: {one}" for one in expected.judge(work)]
        shutil.rmtree(work)
    print(f"{count} random kills, {killed} of them before the end")
    return wrong


def pairs(expected: Expected, count: int) -> list[str]:
    """Two writers at once: one ends well, the other is told who it is."""
    rng, wrong, codes = random.Random(1), [], []
    for number in range(count):
        work, extra = expected.work(), ()
        if number % 2:  # both go on with what was killed
            extra = ("--resume",)
            child = start(work)
            time.sleep(rng.uniform(0.3, 1) * expected.seconds)
            os.kill(child, signal.SIGKILL)
            wait(child)
            said(work)
        first = start(work, *extra)
        time.sleep(rng.choice((0, 0, rng.uniform(0, expected.seconds))))
        ended = sorted(wait(child) for child in (first, start(work, *extra)))
        codes.append(ended)
        output = said(work)
        found = [f"exit codes {ended}: {output}"] if ended[0] != 0 or ended[1] not in (0, 2) else []
        if ended[1] == 2 and not (IN_USE in output or "already holds a run" in output):
            found.append(f"no word on the first one: {output}")
        if "Traceback" in output:
            found.append(f"a stack trace: {output}")
        wrong += [f"disturbed, pair {number}: {one}" for one in found or expected.judge(work)]
        shutil.rmtree(work)
    print(f"{count} pairs of writers, in {sum(2 in ended for ended in codes)} of them one was refused")
    return wrong


def disks(expected: Expected, count: int) -> list[str]:
    """Sizes from a few KiB to the largest that is too small."""
    wrong, sentences, mounted = [], 0, None
    whole = sum(path.stat().st_size for path in (expected.base / "undisturbed").rglob("*") if path.is_file())
    for number in range(count):
        size = int(8192 * (1.2 * whole / 8192) ** (number / max(1, count - 1)))
        work = expected.work()
        mounted = (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(work)], capture_output=True
            ).returncode
            == 0
        )
        limit = size if not mounted else resource.RLIM_INFINITY
        child = start(work, before=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        code, output = wait(child), said(work)
        lines = [line for line in output.replace("\r", "\n").splitlines() if line.startswith("error:")]
        if code and ("Traceback" in output or len(lines) != 1 or DISK_SENTENCE not in lines[0]):
            wrong.append(f"{size} bytes: not one sentence: {output}")
        sentences += bool(code) and len(lines) == 1
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", str(work)], check=True)
        wrong += [f"{size} bytes: {one}" for one in expected.judge(work)]
        if mounted:
            subprocess.run(["umount", str(work)], check=True)
        shutil.rmtree(work)
    print(f"{count} sizes of {'a disk' if mounted else 'files'}, {sentences} too small and said in one sentence")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every point, 50 kills, 30 pairs, 32 disks")
    whole = {"points": 10**6, "kills": 50, "pairs": 30, "disks": 32}
    for name in whole:
        parser.add_argument(f"--{name}", type=int, default=0)
    options = vars(parser.parse_args())
    if options["all"]:
        options |= whole
    import torch

    import interventions.cli.train_bridge  # noqa: F401

    torch.set_num_threads(1)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as base:
        expected = Expected(Path(base))
        print(f"undisturbed: {expected.seconds:.1f} s, {expected.points} changes of the file system")
        for attack in (points, kills, pairs, disks):
            if options[attack.__name__]:
                wrong += attack(expected, options[attack.__name__])
    print("\n".join(wrong) or "nothing lost, left over or disturbed")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
