"""channels.json: what was chosen stays as it was chosen, and strengths of other units are never misread."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from support.report_runs import evidence

from interventions.bundle.channels import Channel, Rule, load_channels, save_channel

CHOSEN = Channel(
    name="pair",
    site=2,
    indices=(3, 11),
    weights=(1.0, -0.5),
    selection={"units": "exact", "sets": {"2": [3, 11]}, "doses": {"2": {"strength": 1.5}}, "effects": {3: 0.1, 11: 2}},
    rules=(Rule(quantity="number of indices", bound="at most", threshold=4, reached=2),),
)


def entry_of(folder: Path) -> tuple[Path, dict]:
    path = folder / "channels.json"
    return path, json.loads(path.read_text())


def test_a_channel_comes_back_with_its_digest(tmp_path: Path) -> None:
    save_channel(tmp_path, CHOSEN)
    (again,) = load_channels(tmp_path).values()
    assert again.digest == CHOSEN.digest == entry_of(tmp_path)[1]["pair"]["digest"]
    assert again.strength == 1.5
    assert replace(CHOSEN, weights=(1.0, -0.4)).digest != CHOSEN.digest


def test_a_choice_that_was_changed_is_refused(tmp_path: Path) -> None:
    save_channel(tmp_path, CHOSEN)
    path, entries = entry_of(tmp_path)
    entries["pair"]["selection"]["doses"]["2"]["strength"] = 2.0
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"channels\.json: channel 'pair' was changed after it was chosen"):
        load_channels(tmp_path)
    del entries["pair"]["digest"]  # as the message says
    path.write_text(json.dumps(entries))
    assert load_channels(tmp_path)["pair"].strength == 2.0


def test_strengths_of_other_units_are_left_out_with_a_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_channel(tmp_path, CHOSEN)
    path, entries = entry_of(tmp_path)
    del entries["pair"]["digest"], entries["pair"]["selection"]["units"]  # as earlier versions wrote it
    path.write_text(json.dumps(entries))
    with caplog.at_level(logging.WARNING):
        old = load_channels(tmp_path)["pair"]
    assert (old.indices, old.weights, old.strength, old.rules) == (CHOSEN.indices, CHOSEN.weights, 1.0, ())
    assert "doses" not in old.selection
    assert old.selection["sets"] == CHOSEN.selection["sets"]
    assert "strengths of channel 'pair' are of an earlier version's units" in caplog.text
    # Beside a new channel it is kept as it was read: without strengths.
    save_channel(tmp_path, replace(CHOSEN, name="new"))
    assert load_channels(tmp_path)["pair"].strength == 1.0


def test_evidence_is_kept_with_a_digest_of_its_own(tmp_path: Path) -> None:
    """Measured, not chosen: the channel stays the one that results were steered with."""
    measured = replace(CHOSEN, evidence=evidence())
    assert measured.digest == CHOSEN.digest
    save_channel(tmp_path, measured)
    (again,) = load_channels(tmp_path).values()
    assert again.evidence == measured.evidence
    assert again.digest == entry_of(tmp_path)[1]["pair"]["digest"] == CHOSEN.digest
    save_channel(tmp_path, CHOSEN)
    assert "evidence" not in entry_of(tmp_path)[1]["pair"]  # as earlier versions wrote it
    assert load_channels(tmp_path)["pair"].evidence is None


def test_evidence_that_was_changed_or_is_another_channels_is_refused(tmp_path: Path) -> None:
    save_channel(tmp_path, replace(CHOSEN, evidence=evidence()))
    path, entries = entry_of(tmp_path)
    entries["pair"]["evidence"]["new"]["encoder"]["auc"] = 0.99
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="the evidence of channel 'pair' was changed, or is another channel's"):
        load_channels(tmp_path)
    entries["pair"]["evidence"]["new"]["encoder"]["auc"] = evidence().new.encoder.auc
    entries["pair"]["weights"] = [1.0, -0.4]
    del entries["pair"]["digest"]  # a channel of one's own, then, which the evidence is not of
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="or is another channel's: remove it there, and measure it again"):
        load_channels(tmp_path)
    entries["pair"]["evidence"]["new"]["encoder"]["auc"] = "high"
    del entries["pair"]["evidence"]["digest"]
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="auc"):
        load_channels(tmp_path)
