"""A configuration's local files are read only where this machine tokenized them so before."""

from pathlib import Path

import pytest
from support.helpers import tiny_tokenizer

from sparse_model.data.corpus import CorpusConfig, check_read_here, load_blocks


@pytest.mark.parametrize("named", [".", "~/notes", "/somewhere/notes"])
def test_files_that_were_never_tokenized_here_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """Of the working folder, of the home, by a whole path."""
    folder, cache = tmp_path / "home" / "notes", tmp_path / "cache"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"the secret number {number}\n" * 200)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = CorpusConfig(spec=named.replace("/somewhere", str(tmp_path / "home")), max_tokens=2000, val_fraction=0.25)
    with pytest.raises(ValueError, match="has not been tokenized on this machine"):
        check_read_here(config, tiny_tokenizer(), 16, cache_dir=cache)
    load_blocks(config, tiny_tokenizer(), 16, cache_dir=cache, progress=False)
    check_read_here(config, tiny_tokenizer(), 16, cache_dir=cache)
    (folder / "0.txt").write_text("another secret\n")
    with pytest.raises(ValueError, match="has not been tokenized on this machine"):
        check_read_here(config, tiny_tokenizer(), 16, cache_dir=cache)


@pytest.mark.parametrize("spec", ["generated", "stdlib", "generated:0.5,stdlib:0.5"])
def test_what_every_installation_has_is_read(tmp_path: Path, spec: str) -> None:
    check_read_here(CorpusConfig(spec=spec), tiny_tokenizer(), 16, cache_dir=tmp_path)
