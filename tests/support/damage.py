"""Ways in which a file is damaged, or made by somebody hostile."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any


def leaves(data: Any, path: tuple = ()) -> list[tuple]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    below = [leaf for key, value in items for leaf in leaves(value, (*path, key))]
    return [*([path] if path else []), *below]


VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 10**9, 10**30, -(10**12), 0.5, -0.25, 1e300, float("nan"), float("inf"), "", "1",
    "both", "../../etc/passwd", [], [1], {}, {"a": 1}, "x" * 10_000, [[[[]]]],
]  # fmt: skip


def change_json(text: str, rng: random.Random) -> str:
    data = json.loads(text)
    kind = rng.choice(["value"] * 8 + ["near", "near", "remove", "rename", "extra", "nest", "twice", "whole"])
    places = leaves(data)
    if kind == "whole" or not places:
        return json.dumps(rng.choice(VALUES))
    if kind == "nest":
        return rng.choice(["[" * 100_000, '{"a":' * 5_000 + "1" + "}" * 5_000, "[" * 60 + "]" * 60])
    if kind == "twice":
        key = next(iter(data), "a") if isinstance(data, dict) else "a"
        return text.rstrip().removesuffix("}") + f', "{key}": 1}}'
    *above, last = rng.choice(places)
    inner = data
    for key in above:
        inner = inner[key]
    if kind == "near" and isinstance(inner[last], int | float):
        inner[last] = inner[last] * rng.choice([2, -1, 1000]) + rng.choice([0, 1])
    elif kind == "remove":
        del inner[last]
    elif kind == "rename" and isinstance(inner, dict):
        inner[f"{last}_"] = inner.pop(last)
    elif kind == "extra" and isinstance(inner, dict):
        inner["auto_map"] = {
            "AutoConfig": "evil.C",
            "AutoModelForCausalLM": "evil.C",
            "AutoTokenizer": ["evil.C", "evil.C"],
        }
    else:
        inner[last] = rng.choice(VALUES)
    return json.dumps(data, indent=1)


def change_header(data: bytes, rng: random.Random) -> bytes:
    """The header of a safetensors file: other types, shapes, offsets, names."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = rng.choice([name for name in header if name != "__metadata__"] or [""])
    kind = rng.choice(["dtype", "shape", "name", "offset", "length"])
    if kind == "length" or not entry:
        return rng.choice([0, 1, 2**40, 2**63]).to_bytes(8, "little") + data[8:]
    if kind == "dtype":
        header[entry]["dtype"] = rng.choice(["I32", "F64", "BF16", "U32", "BOOL", "X9"])
    if kind == "shape":
        header[entry]["shape"] = rng.choice([[], [2**40], [1, *header[entry]["shape"]], header[entry]["shape"][::-1]])
    if kind == "offset":
        header[entry]["data_offsets"] = rng.choice([[0, 2**50], [4, 0], [0, 8]])
    if kind == "name":
        header[rng.choice(["", "x.weight", entry + ".indices"])] = header.pop(entry)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


class Evil:
    """A pickle that writes a file when it is read without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def change(path: Path, other: Path, marker: Path, rng: random.Random) -> str:
    """Change a file in one of many ways; says which."""
    data = path.read_bytes()
    optional = path.name in ("channels.json", "metrics.json", "metrics.jsonl") or path.parent.name == "circuits"
    kind = rng.choice(
        ["bits", "bits", "cut", "empty", "more", "random", "others", "folder", "gone", "text", *["form"] * 12]
    )
    kind = "cut" if optional and kind == "gone" else kind
    if kind == "form" and path.suffix == ".json":
        path.write_text(change_json(path.read_text(), rng))
    elif kind == "form" and path.suffix == ".safetensors":
        path.write_bytes(change_header(data, rng))
    elif kind == "form" and path.suffix == ".pt":
        import torch

        torch.save({"transformer.wte.weight": Evil(marker)}, path)
    elif kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    elif kind == "others" and other.exists():
        shutil.copy(other, path)
    elif kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data) or 1)])
    elif kind in ("empty", "text", "random", "more"):
        added = {"empty": b"", "text": b"hello\n", "random": rng.randbytes(1000), "more": data + rng.randbytes(9)}
        path.write_bytes(added[kind])
    else:
        kind, flipped = "bits", bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 3, 50])):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(flipped))
    (path.parent / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    return kind
