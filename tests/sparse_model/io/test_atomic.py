"""A reader sees the old file or the new one, and nothing is left beside it."""

from pathlib import Path

import pytest

from sparse_model.io.atomic import WriteFailed, check_writable, check_writable_file, replace_file, write_text


def test_write_text_makes_folders_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    write_text(path, "one\n")
    write_text(path, "zwei é\n")
    assert path.read_bytes() == "zwei é\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_write_text_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.txt"
    write_text(path, "old")

    def fail(self: Path, *_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="killed"):
            write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_fails_half_way_is_not_seen(tmp_path: Path) -> None:
    def write() -> None:
        with replace_file(tmp_path / "c.bin") as temporary:
            temporary.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_known_before_it_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_writable_file(tmp_path / "new" / "deep" / "x.png")
    check_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for check, path, words in (
        (check_writable, tmp_path / "file" / "x" / "y.png", "file is a file"),
        (check_writable, Path("/proc/none/x.png"), "cannot be written"),
        (check_writable_file, tmp_path, "is a folder: name a file in it"),
    ):
        with pytest.raises(WriteFailed, match=words):
            check(path)
