"""A file of pairs that is in order, and lines to break it with."""

import json
from pathlib import Path
from typing import Any

SLOTS = {"noun": ["cat", "dog", "bus", "cup"], "verb": ["load", "save"]}
SPLIT_LINES = {"train": "", "selection": "{noun:2}\n", "evaluation": "{noun:2} = {noun}\n"}


def line(split: str, before: str = "", **other: Any) -> dict[str, Any]:
    return {
        "split": split,
        "prompts": [before + '{verb}("{noun}', before + "{verb}('{noun}"],
        "answers": ['")', "')"],
    } | other


GOOD = [{"slots": SLOTS, "channel": "quote"}, *(line(split, before) for split, before in SPLIT_LINES.items())]


def write(folder: Path, rows: list[Any], name: str = "mine.jsonl") -> Path:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / name).write_text(text)
    return folder / name
