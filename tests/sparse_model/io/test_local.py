"""One rule for whether a name is a path here or a name on the hub."""

from pathlib import Path

import pytest

from interventions import load_dense
from sparse_model.io.local import local_path


@pytest.mark.parametrize("name", ["./gpt2", "/models/gpt2", "~/gpt2", "a/b/c", Path("gpt2")])
def test_what_looks_like_a_path_is_one_though_nothing_is_there(name: str | Path) -> None:
    assert local_path(name) == Path(name).expanduser()


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "org/model-1.5b"])
def test_a_hub_name_is_local_only_where_it_exists(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_path(name) is None
    Path(name).mkdir(parents=True)
    assert local_path(name) == Path(name)


def test_a_slip_in_the_name_of_a_run_is_not_asked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/demo").mkdir(parents=True)
    assert local_path("runs/dmeo") == Path("runs/dmeo")
    assert local_path("dmeo") is None
    with pytest.raises(FileNotFoundError, match=r"no run at runs/dmeo: train one .* or use a packaged bundle .*\)$"):
        load_dense("runs/dmeo")
