"""Progress where standard error is no terminal: lines, few of them, and none of a bar that is taken away at once."""

import io

import pytest
from tqdm.auto import tqdm

from sparse_model.io import progress
from sparse_model.io.progress import ProgressLines, progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the time is; it goes on when a test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_a_minute_and_a_last_one(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(total=300, desc="dense", unit="step", mininterval=0) as bar:
        for step in range(300):
            clock[0] += 1  # 300 seconds
            bar.set_postfix_str(f"ce {step}")
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 300 // 60 + 1
    assert lines[0].startswith("dense: 59 of 300 step, ")
    assert lines[0].endswith("left, ce 59")
    assert lines[-1].startswith("dense: 300 of 300 step, ")


def test_a_bar_that_goes_away_says_nothing_in_its_first_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(progress_bar(range(5), "sites", leave=False)) == [0, 1, 2, 3, 4]
    assert list(progress_bar(range(5), "sites", disable=True)) == [0, 1, 2, 3, 4]
    with progress_bar(total=2900, unit=" tokens", unit_scale=True, desc="corpus", leave=False, mininterval=0) as bar:
        clock[0] += 61
        bar.update(3000)
    err = capsys.readouterr().err
    assert err.startswith("corpus: 3.00k of 3.00k tokens, ")
    assert err.count("\n") == 1
    assert "\r" not in err


def test_a_terminal_gets_the_usual_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    bar = progress_bar(total=1)
    assert isinstance(bar, tqdm)
    assert not isinstance(bar, ProgressLines)
    bar.close()
