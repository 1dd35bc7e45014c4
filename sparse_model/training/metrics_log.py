"""metrics.jsonl: one record of a training run per line."""

import json
from pathlib import Path

from sparse_model.io.atomic import failed_writes_named, write_text
from sparse_model.io.reading import parse_json


class MetricsLog:
    """metrics.jsonl, appended line by line; on resume, lines after the checkpoint's step are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [r for r in read_metrics(path) if r["step"] <= step] if step and path.exists() else []
        write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
        self.path = path

    def write(self, record: dict) -> None:
        with failed_writes_named(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.is_file():
        raise ValueError(f"{path} is no file: remove it")
    records: list[dict] = []
    for line in path.read_bytes().splitlines():
        try:
            record = parse_json(line.decode("utf-8"), finite=False)
        except ValueError:
            break
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{path} is damaged (line {len(records) + 1} holds no step): remove it")
        records.append(record)
    return records


def flat(record: dict) -> dict[str, int | float]:
    """A record for trackers: per-site lists become name/site."""
    out: dict[str, int | float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            out |= {f"{name}/{site}": v for site, v in enumerate(value)}
        else:
            out[name] = value
    return out
