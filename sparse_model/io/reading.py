"""The one way to read JSON from disk: limits, then types, then (where it was sealed) its digest; one sentence each.

Whoever reads says the remedy. What a file may hold is said by a type: a dataclass, NamedTuple or TypedDict.
"""

import hashlib
import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

LARGEST_FILE = 64 * 2**20
"""Bytes of a JSON file; a report's figures take thousandths of it."""
DEEPEST = 32
"""Lists and objects inside each other."""
SEAL = "sha256"
"""Key by which a file that has no digest elsewhere holds the digest of everything else in it."""

NOTHING_ELSE = {"extra": "forbid"}
"""As `__pydantic_config__` of a dataclass: a key that is none of its fields is refused."""

T = TypeVar("T")


def read_json(path: Path, remedy: str, *, finite: bool = True) -> Any:
    """What a JSON file holds. Raises FileNotFoundError, and ValueError that names file, fault and remedy.

    Refused: more than 64 MiB, deep nesting, a key twice and, if `finite`, numbers beyond 64 bits and those that are not
    finite (a figure may be undefined).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {remedy}")
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ValueError(f"it has {size / 2**20:.0f} MiB, at most {LARGEST_FILE // 2**20} are read")
        return parse_json(path.read_text(encoding="utf-8"), finite=finite)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error


def read_typed(kind: Callable[..., T], path: Path, remedy: str) -> T:
    """What a JSON file holds, as a type; raises as `read_json`, naming the key and the value that do not fit."""
    return typed(kind, read_json(path, remedy), path, remedy)


def parse_json(text: str, *, finite: bool = True) -> Any:
    """Parse JSON within the limits of `read_json`; ValueError says what is wrong."""
    try:
        data = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_whole if finite else int,
            parse_float=_finite if finite else float,
            parse_constant=_finite if finite else float,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(data)
    return data


def typed(kind: Callable[..., T], data: Any, source: Path | str, remedy: str) -> T:
    """Parsed JSON as a type, nothing converted: True is no number and "2" neither. ValueError as `read_typed`."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        words = _words(error.errors())
        if isinstance(kind, type):
            raise ValueError(f"{source} is not a valid {kind.__name__.lstrip('_')}: {words}; {remedy}") from error
        raise ValueError(f"{source} is damaged ({words}): {remedy}") from error


def typed_line(kind: Callable[..., T], line: str, place: str, remedy: str) -> T:
    """One line of JSON as a type; raises as `read_typed`, naming the place, such as file and line."""
    try:
        data = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{place} is damaged ({error}): {remedy}") from error
    return typed(kind, data, place, remedy)


def sealed(data: dict[str, Any]) -> str:
    """JSON text of an object and, in it, its digest; `read_sealed` finds what changed afterwards."""
    plain = json.loads(json.dumps(data))
    return json.dumps(plain | {SEAL: _seal(plain)}, indent=1) + "\n"


def read_sealed(path: Path, remedy: str, *, finite: bool = True) -> dict[str, Any]:
    """What `sealed` wrote, without its digest, or an object of an earlier version, which has none; as `read_json`."""
    data = read_json(path, remedy, finite=finite)
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged (it holds no object): {remedy}")
    seal = data.pop(SEAL, None)
    if seal is not None and seal != _seal(data):
        raise ValueError(
            f"{path} is not as it was written (another digest than its {SEAL!r}): {remedy}; or, if you changed it on "
            f"purpose, take the line {SEAL!r} out"
        )
    return data


def _seal(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter  # where something is read: the command line's help needs none

    return TypeAdapter(kind)


def _words(errors: list[Any]) -> str:
    """The first of pydantic's findings, all unknown keys together."""
    unknown = [_place(e) for e in errors if e["type"] in ("unexpected_keyword_argument", "extra_forbidden")]
    if unknown:
        return f"unknown key {', '.join(unknown)}"
    first = errors[0]
    place = _place(first)
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"key {place} is missing"
    if first["type"] == "value_error":
        return f"{place}{': ' if place else ''}{first['ctx']['error']}"
    value = repr(first["input"])
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{place or 'it'}={value if len(value) < 60 else value[:57] + '...'}: {message}"


def _place(error: Any) -> str:
    return ".".join(str(part) for part in error["loc"])[:200]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {twice!r} twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= 2**63:
        raise ValueError(f"the number {digits[:20]}... is too large")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is not finite")
    return value


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")
