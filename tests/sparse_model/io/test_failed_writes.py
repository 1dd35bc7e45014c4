"""A write that fails is one sentence with the file's name, in the words of each library that writes; others pass."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sparse_model.io.atomic import WriteFailed, replace_file, replace_folder, write_text
from sparse_model.training.metrics_log import MetricsLog

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (FULL, "No space left on device"),
        (OSError(errno.EFBIG, "File too large"), "File too large"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (Exception("No space left on device (os error 28)"), "No space left on device"),  # tokenizers
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
            "the disk took no more",
        ),
    ],
)
@pytest.mark.parametrize("replace", [replace_file, replace_folder])
def test_each_librarys_failure(raised: Exception, reason: str, replace: Callable, tmp_path: Path) -> None:
    def write() -> None:
        with replace(tmp_path / "weights"):
            raise raised

    with pytest.raises(WriteFailed, match=rf"weights could not be written \({reason}.*\); what was there before is as"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("raised", [ValueError("no such size"), FileNotFoundError("gone"), RuntimeError("shapes")])
def test_other_errors_keep_their_meaning(raised: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(raised), match=str(raised)) as error, replace_file(tmp_path / "weights"):
        raise raised
    assert not isinstance(error.value, WriteFailed)


def test_the_log_is_appended_and_on_resume_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write_text(path, '{"step": 1}\n{"step": 2}\n{"step"')
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(FULL))
        with pytest.raises(WriteFailed, match=r"metrics\.jsonl could not be written"):
            MetricsLog(path, 1)
    assert path.read_text().startswith('{"step": 1}\n{"step": 2}\n')
    log = MetricsLog(path, 1)
    assert path.read_text() == '{"step": 1}\n'
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(FULL))
    with pytest.raises(WriteFailed, match=r"metrics\.jsonl could not be written"):
        log.write({"step": 2})
