"""The GPU's benchmark, run dry: the same script on the CPU at small sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bridges.run_folder import open_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "gpu.py"


def records(out: Path, *options: str) -> dict[str, list[dict]]:
    command = [sys.executable, SCRIPT, "--device", "cpu", "--quick", "--out", out, *options]
    # A second thread on a busy machine costs more than it brings.
    subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found: dict[str, list[dict]] = {}
    for line in (out / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["part"], []).append(record)
    return found


def test_a_dry_run_measures_every_part(tmp_path: Path) -> None:
    found = records(tmp_path)
    assert found["kernels"][0]["wrong"] == 0
    assert {"ms", "torch_topk_ms", "copy_ms"} <= set(found["kernels"][1])
    assert [record["what"] for record in found["step"]] == ["tf32", "fp32"]
    assert all(record["tokens_per_second"] > 0 for record in found["step"])
    assert found["equality"][0]["equal"]
    held_out = found["code"][-1]
    assert held_out["what"] == "held out", held_out
    assert held_out["half_megabytes"] < 60
    assert open_run(tmp_path / "code-half").sparse.cfg.d_vocab == 384
    assert len((tmp_path / "results.md").read_text().splitlines()) == 2 + sum(map(len, found.values()))


def test_a_part_that_breaks_is_a_record(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "config.json").write_text("{")
    (found,) = records(tmp_path, "--parts", "code")["code"]
    assert found["what"] == "failed"
    assert "config.json" in found["reason"]
