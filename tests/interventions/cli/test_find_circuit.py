"""find-circuit writes a circuit, says whether it is controlled, starts from another and searches settings."""

import json
from pathlib import Path

import pytest

from bridges.run_folder import open_run
from interventions.bundle.channels import Channel, save_channel
from interventions.circuits.circuit import (
    load_circuit,
)
from interventions.circuits.prune_config import PruneConfig
from interventions.cli.find_circuit import Options, main


@pytest.mark.parametrize("controls", [False, True])
def test_it_writes_a_circuit_and_says_whether_it_is_controlled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], controls: bool
) -> None:
    """On a random model, asked for no more than chance: then no node at all is needed."""
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path))
    for name, site in (("quote_type", 3), ("at_the_end", 4)):
        selection = {"task": "single_double_quote"}
        save_channel(folder, Channel(name=name, site=site, indices=(2,), weights=(1.0,), selection=selection))
    config = PruneConfig(steps=2, pairs=4, pool=8, selection_pairs=4, target_loss=0.75, reference_tokens=128)
    main(Options(run=str(folder), controls=controls, draws=2, evaluation_pairs=4, seeds=1, config=config))
    printed = capsys.readouterr().out
    circuit = load_circuit(open_run(folder), "single_double_quote")
    assert f"{circuit.n_nodes} nodes, {circuit.n_edges} edges" in printed
    assert ("UNCONTROLLED" in printed) is not controls
    assert (circuit.controls is not None) is controls
    assert ("necessity" in printed) is controls
    assert ("interchange of quote_type" in printed) is controls
    assert "at_the_end" not in printed
    assert circuit.n_nodes == 0
    assert circuit.config["steps"] == 2


def test_it_starts_from_an_earlier_circuit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path))
    config = PruneConfig(steps=1, pairs=4, pool=8, selection_pairs=4, target_loss=0.75, reference_tokens=128)
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"nodes": ["0.mlp.post_act.3", "1.attn.q.head0.ch1"]}))
    main(Options(run=str(folder), start_from=str(earlier), seeds=1, evaluation_pairs=4, config=config))
    assert "gates at the end of pruning: 2 nodes" in caplog.text
    earlier.write_text(json.dumps({"nodes": ["0.mlp.post_act.100000"]}))
    for path, message in ((earlier, "earlier.json is no circuit for this model: .*100000"), ("gone.json", "gone.json")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            main(Options(run=str(folder), start_from=str(path), seeds=1, evaluation_pairs=4, config=config))


def test_it_searches_settings(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path))
    config = PruneConfig(steps=2, pairs=4, pool=8, selection_pairs=4, target_loss=0.75, reference_tokens=128)
    for trials in (2, 1):  # the second time they are all there
        main(Options(run=str(folder), model="dense", search=trials, seeds=1, evaluation_pairs=4, config=config))
        assert "fewest edges in 2 trials: 0" in caplog.text
        caplog.clear()
    circuit = load_circuit(open_run(folder), "single_double_quote", "dense")
    assert circuit.config["target_loss"] == 0.75
    assert (folder / "circuits" / "search.db").exists()
