"""The one reader: limits, types, digests."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from bridges.config import RunConfig
from interventions.steering.experiment_config import Experiment
from sparse_model.io.manifest import check_manifest, write_manifest
from sparse_model.io.reading import NOTHING_ELSE, read_json, read_sealed, read_typed, sealed, typed
from sparse_model.training.pretrain import PretrainConfig


@dataclass(frozen=True)
class Thing:
    """A file's content."""

    __pydantic_config__ = NOTHING_ELSE

    count: int
    share: float = 0.5
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"count": true}', "count=True: input should be a valid integer"),
        ('{"count": 1.0}', r"count=1\.0: input should be a valid integer"),
        ('{"count": "1"}', "count='1'"),
        ('{"share": 1}', "key count is missing"),
        ('{"count": 1, "share": null}', "share=None"),
        ('{"count": 1, "names": ["a", 2]}', r"names\.1=2"),
        ('{"count": 1, "other": 2}', "unknown key other"),
        ('{"count": 1, "count": 2}', "the key 'count' twice"),
        ('{"count": 1, "share": NaN}', "NaN is not finite"),
        ('{"count": 1, "share": 1e999}', "1e999 is not finite"),
        ('{"count": 99999999999999999999}', "is too large"),
        ("[" * 10**6, "nested too deeply"),
        ("[" * 40 + "]" * 40, "nested deeper than 32"),
        ("", "damaged"),
        ("[]", r"it=\[\]"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "thing.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"thing\.json is .*{said}.*make it again") as error:
        read_typed(Thing, path, "make it again")
    assert "\n" not in str(error.value)


def objects(data: Any) -> Iterator[dict[str, Any]]:
    if isinstance(data, dict):
        yield data
        for value in data.values():
            yield from objects(value)


@pytest.mark.parametrize("kind", [RunConfig, PretrainConfig, Experiment])
def test_no_configuration_takes_a_key_that_it_does_not_know(kind: type) -> None:
    whole = asdict(kind())
    assert typed(kind, whole, "config.json", "") == kind()
    for number in range(len(list(objects(whole)))):
        changed = asdict(kind())
        list(objects(changed))[number]["no_such_key"] = 1
        with pytest.raises(ValueError, match=r"unknown key .*no_such_key"):
            typed(kind, changed, "config.json", "")


def test_a_whole_number_does_for_a_real_one_and_a_list_for_a_tuple(tmp_path: Path) -> None:
    (tmp_path / "thing.json").write_text('{"count": 2, "share": 1, "names": ["a"]}')
    assert read_typed(Thing, tmp_path / "thing.json", "") == Thing(2, 1.0, ("a",))


def test_a_file_that_is_too_large_or_none_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(ValueError, match="65 MiB, at most 64"):
        read_json(tmp_path / "large.json", "")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_json(tmp_path, "")


def test_a_seal_shows_that_a_number_changed_and_files_without_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sealed.json"
    path.write_text(sealed({"a": 1.25, "b": {"c": [1, 2]}}))
    assert read_sealed(path, "") == {"a": 1.25, "b": {"c": [1, 2]}}
    path.write_text(path.read_text().replace("1.25", "1.75"))
    with pytest.raises(ValueError, match=r"sealed\.json is not as it was written"):
        read_sealed(path, "")
    data = json.loads(path.read_text())
    del data["sha256"]
    path.write_text(json.dumps(data))
    assert read_sealed(path, "")["a"] == 1.75


def test_a_flipped_bit_is_named_and_no_digests_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "part").mkdir()
    weights = tmp_path / "part" / "weights"
    weights.write_bytes(bytes(1000))
    for _ in range(2):
        check_manifest(tmp_path)
    assert caplog.text.count("has no digests.json") == 1
    write_manifest(tmp_path, ["part"])
    check_manifest(tmp_path)
    weights.write_bytes(bytes(999) + b"\x01")
    with pytest.raises(ValueError, match="part/weights is not as it was when training ended"):
        check_manifest(tmp_path)
    check_manifest(tmp_path, ["other/"])
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="part/weights does not exist, but"):
        check_manifest(tmp_path)
