"""Labels of a circuit: what lies in the run is on the page as text, the rest is said; and the ends of its picture."""

import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import make_tiny_run
from support.report_page import Page, page_of
from support.report_runs import EVIL, TASK, circuit

from bridges.run_folder import Run, fingerprint, write_digests
from interventions import save_pretrained
from interventions.circuits.circuit import load_circuit
from interventions.circuits.picture_layout import place_nodes
from interventions.report.ends import picture_ends
from interventions.report.labels import LONGEST, label_path, read_labels
from interventions.tasks.of_run import run_task

READ, WRITE = "0.mlp.act_in.3", "0.attn.resid_delta.3"


@pytest.fixture
def run(bare: Run) -> Run:
    circuit(bare)
    return bare


def write(run: Run, written: Any, key: str = TASK, **changed: Any) -> Path:
    path = label_path(run.folder, key)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"circuit": key, "fingerprint": fingerprint(run), "nodes": written} | changed))
    return path


def test_labels_of_the_run_are_on_the_page_as_text(run: Run) -> None:
    given = {READ: {"label": EVIL, "pinned": True}, WRITE: {"group": "g", "label": "", "pinned": False}}
    write(run, given | {"7.mlp.act_in.1": {"label": "gone"}, "0.mlp.act_in.31": {"group": "g"}})
    page = page_of(run)
    assert EVIL not in page.html
    data = page.data["circuits"][TASK]
    assert data["fingerprint"] == fingerprint(run)
    assert data["labels"][READ] == {"label": EVIL, "pinned": True}
    assert data["labels"][WRITE] == {"group": "g"}
    assert set(data["labels"]) == {READ, WRITE, "7.mlp.act_in.1", "0.mlp.act_in.31"}  # saving again loses none
    names = {"7.mlp.act_in.1", "0.mlp.act_in.31"} - set(load_circuit(run, TASK).names)
    said = f"labels nodes that this circuit does not have, which are not shown: {', '.join(sorted(names))}."
    assert "7.mlp.act_in.1" in names
    assert said in page.words["circuits"]


def test_many_unknown_nodes_are_counted(run: Run) -> None:
    write(run, {f"9.mlp.act_in.{number}": {"pinned": True} for number in range(5)})
    (note,) = read_labels(run.folder, TASK, load_circuit(run, TASK)).notes
    assert note.endswith("9.mlp.act_in.0, 9.mlp.act_in.1, 9.mlp.act_in.2 and 2 more.")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"nodes": {READ: {"label": "x" * (LONGEST + 1)}}}, "label has 81 characters, at most 80"),
        ({"nodes": {READ: {"group": 3}}}, "nodes.0.mlp.act_in.3.group=3"),
        ({"nodes": {READ: {"colour": "red"}}}, "unknown key nodes.0.mlp.act_in.3.colour"),
        ({"nodes": {str(n): {} for n in range(4001)}}, "it has 4001 nodes, at most 4000"),
        ({"fingerprint": "another"}, "of the run another, not single_double_quote"),
        ({"circuit": EVIL}, f"labels {EVIL} of the run"),
        ({"extra": 1}, "unknown key extra"),
    ],
)
def test_labels_that_do_not_fit_are_left_out_with_a_sentence(run: Run, changed: dict[str, Any], reason: str) -> None:
    path = write(run, {READ: {"label": "mine"}}, **changed)
    found = read_labels(run.folder, TASK, load_circuit(run, TASK))
    assert found.nodes == {}
    (note,) = found.notes
    assert note.startswith(f"Labels are left out: {path}")
    assert reason in note
    assert note.endswith("take the file away, or download the labels again from the report.")


def test_a_pipe_and_a_folder_are_no_labels(run: Run) -> None:
    path = label_path(run.folder, TASK)
    path.parent.mkdir()
    os.mkfifo(path)
    assert "does not exist" in read_labels(run.folder, TASK, load_circuit(run, TASK)).notes[0]
    path.unlink()
    path.mkdir()
    assert "does not exist" in read_labels(run.folder, TASK, load_circuit(run, TASK)).notes[0]


def test_what_does_not_read_is_said_on_the_page(run: Run) -> None:
    label_path(run.folder, TASK).parent.mkdir()
    label_path(run.folder, TASK).write_text("{")
    other = write(run, {}, "no_such_circuit")
    page = page_of(run)
    assert page.data["circuits"][TASK]["labels"] == {}
    assert "Labels are left out:" in page.words["circuits"]
    assert any(f"{other} labels a circuit that the report does not show" in warning for warning in page.warnings)


def test_a_bundle_for_others_has_the_labels(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run", n_layers=1)
    circuit(run)
    write_digests(run.folder)
    path = write(run, {READ: {"label": "quotes"}})
    out = save_pretrained(run.folder, tmp_path / "out")
    assert label_path(out, TASK).read_text() == path.read_text()


def test_the_ends_are_the_prompts_tokens_and_the_answers(full: Run, page: Page) -> None:
    """By hand: tokens where a pair differs, and weights of the embedding and of the unembedding times the gain."""
    data, found = page.data["circuits"][TASK], load_circuit(full, TASK)
    batch = run_task(full, TASK).sample(64, split="evaluation", seed=full.config.seed)
    inputs: Counter[int] = Counter()
    answers: Counter[int] = Counter()
    for (first, second), last, pair in zip(batch.tokens, batch.last, batch.answers, strict=True):
        for at in range(int(last) + 1):
            if first[at] != second[at]:
                inputs.update([int(first[at]), int(second[at])])
        answers.update(pair.tolist())
    gain = full.sparse.ln_final.weight
    for side, counts, place, weight in (
        ("input", inputs, "act_in", lambda token, channel: full.sparse.token_embed.weight[token, channel]),
        (
            "answer",
            answers,
            "resid_delta",
            lambda t, channel: full.sparse.unembedding.weight[t, channel] * gain[channel],
        ),
    ):
        ends = [end for end in data["ends"] if end["side"] == side]
        assert {end["token"] for end in ends} <= set(counts)
        assert len(ends) == min(8, len(counts))
        assert min(counts[end["token"]] for end in ends) >= max(sorted(counts.values())[: -len(ends)], default=0)
        for end in ends:
            wanted = {}
            for index, name in enumerate(found.names):
                if place in name and (value := weight(end["token"], int(name.rpartition(".")[2])).item()):
                    wanted[index] = pytest.approx(value, rel=5e-3)
            assert dict(end["ties"]) == wanted
            assert str(end["token"]) in page.data["tokens"]
        rows = sorted(end["row"] for end in ends)
        assert all(later - earlier > 0.999 for earlier, later in pairwise(rows))
        assert rows[0] >= 0
    assert sum(len(end["ties"]) for end in data["ends"]) > 4
    assert page.data["circuits"][f"{TASK}-dense"]["ends"] == []


def test_an_answers_tie_has_the_final_norms_gain(run: Run) -> None:
    found, batch = load_circuit(run, TASK), run_task(run, TASK).sample(8, split="evaluation", seed=0)
    layout = place_nodes(found.to_networkx())

    def weights() -> dict[tuple[str, int, int], float]:
        ends = picture_ends(run.sparse, found, layout, batch)
        return {(end["side"], end["token"], node): weight for end in ends for node, weight in end["ties"]}

    before = weights()
    with torch.no_grad():
        run.sparse.ln_final.weight[3] = 2.0
    doubled = {place for place in before if place[0] == "answer" and found.names[place[2]].endswith("resid_delta.3")}
    changed = {place: 2 * weight if place in doubled else weight for place, weight in before.items()}
    assert weights() == pytest.approx(changed, rel=5e-3)
    assert changed != before
