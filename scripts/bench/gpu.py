"""Measure on a GPU, in eight minutes at most: kernels, the gpt2 step, equality with the CPU, preset `code`.

Needs no network. Each part (scripts/bench/gpu_parts.py) runs as a process of its own with its own time limit, and
writes each result at once: OUT/results.jsonl, and OUT/results.md as a table. `code` takes the time that is left;
started again with the same --out it goes on where it was stopped.

Needs this checkout, torch with CUDA, its Triton, transformers and accelerate. Where packages cannot be fetched, bring
wheels of: transformer-lens, fancy-einsum, tyro, typeguard, beartype, docstring-parser, datasets, dill, multiprocess,
and, if they too are missing, jaxtyping, einops, numba, llvmlite, xxhash, safetensors, tokenizers, tqdm.

Examples:
    python scripts/bench/gpu.py --out runs/gpu
    python scripts/bench/gpu.py --out runs/gpu --parts kernels step
    python scripts/bench/gpu.py --device cpu --quick --out runs/dry
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

LIMITS = {"kernels": 70, "step": 150, "equality": 60, "code": 460}
"""Seconds that a part may take, and never more than what is left of all."""

TO_STOP = 20
"""Seconds from being asked to stop, which writes a checkpoint, to being ended."""


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    for part in options.parts:
        limit = min(LIMITS[part], end - time.monotonic() - TO_STOP)
        if limit < 10:
            add_record(options.out, part, "left out", reason="no time was left")
        else:
            run_part(options, part, limit)
        write_table(options.out)
    print((options.out / "results.md").read_text())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS), default=list(LIMITS), help="which parts run")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run of the same code")
    parser.add_argument("--quick", action="store_true", help="small sizes: whether it runs, not how fast")
    parser.add_argument("--seconds", type=float, default=480, help="time limit of all parts together")
    return parser.parse_args()


def run_part(options: argparse.Namespace, part: str, limit: float) -> None:
    """Run one part; what it did not survive becomes a record."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), "--part", part, "--out", str(options.out)]
    command += ["--device", options.device, "--seconds", str(limit), *(["--quick"] if options.quick else [])]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    log = options.out / f"{part}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            add_record(options.out, part, "stopped", reason=f"its {limit:.0f} seconds were over")
            return
    if code:
        last = log.read_text().strip().splitlines()[-1:] or [""]
        add_record(options.out, part, "failed", reason=last[0], log=str(log))


def add_record(out: Path, part: str, what: str, **values: object) -> None:
    """Append one result to OUT/results.jsonl."""
    line = json.dumps({"part": part, "what": what, **values})
    with (out / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def write_table(out: Path) -> None:
    """OUT/results.md from OUT/results.jsonl."""
    rows = ["| part | what | figures |", "|---|---|---|"]
    path = out / "results.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        record = json.loads(line)
        part, what = record.pop("part"), record.pop("what")
        rows.append(f"| {part} | {what} | {', '.join(f'{name} {value}' for name, value in record.items())} |")
    (out / "results.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
