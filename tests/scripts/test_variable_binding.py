"""The study of variable binding: how prompts are rewritten, and a model in which the type's place is known."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import variable_binding
from support.helpers import make_tiny_run
from variable_binding import Other

from bridges.packaged import FOLDER
from bridges.run_folder import Run
from interventions.circuits.node_model import as_nodes
from interventions.tasks.base import TaskBatch
from interventions.tasks.catalogue import get_task
from sparse_model.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(FOLDER / "demo" / "tokenizer")
OPTIONS = variable_binding.Options(pairs=4, draws=2)


def batch(split: str = "evaluation") -> TaskBatch:
    return get_task("set_or_string_fixedvarname", TOKENIZER).sample(4, split=split, seed=0)  # type: ignore[arg-type]


def last_lines(other: Other, pair: int = 0) -> tuple[list[str], list[str]]:
    first, second = variable_binding.rewritten(batch(), TOKENIZER, other).prompts[pair]
    return first.split("\n")[-4:], second.split("\n")[-4:]


def test_another_name_is_put_before_or_behind() -> None:
    for member, kind in enumerate(("set", "str")):
        before, behind = (last_lines(Other(where, "set"))[member] for where in ("before", "behind"))  # type: ignore[arg-type]
        assert before[1] == behind[0] == f"current = {kind}()"
        assert before[0] == behind[1]
        assert before[0].endswith(" = set()")
        assert not before[0].startswith("current")
        assert before[2:] == behind[2:]
        assert before[3].strip() == "current"


@pytest.mark.parametrize("kind", ["set", "str"])
def test_where_the_other_name_is_used_only_the_end_differs(kind: str) -> None:
    plain = batch()
    changed = variable_binding.rewritten(plain, TOKENIZER, Other("before", kind, True))
    first, second = last_lines(Other("before", kind, True))
    assert first[:3] == second[:3]
    own = "str" if kind == "set" else "set"
    assert (first[0].split(" = ")[1], first[1]) == (f"{kind}()", f"current = {own}()")
    assert (first[3].strip(), second[3].strip()) == ("current", first[0].split(" = ")[0])
    wanted = plain.answers if own == "set" else plain.answers.flip(1)
    assert torch.equal(changed.answers, wanted)  # the first prompt's is that of its own name's type


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("binding") / "run", tokenizer=TOKENIZER)


@torch.no_grad()
def test_before_the_first_sublayer_the_type_is_at_its_token_and_at_the_end_at_the_last(run: Run) -> None:
    task = get_task("set_or_string_fixedvarname", run.tokenizer)
    pairs = task.sample(4, split="evaluation", seed=0)
    for model in (run.sparse, run.dense):
        found = variable_binding.holders(model, pairs)
        for site, place in (("attn.0", "type"), ("unembed", "last")):
            wanted = {name: float(name == place) for name in found[site]}
            assert found[site] == pytest.approx(wanted, abs=1e-4)
    odds = variable_binding.toward_set(as_nodes(run.sparse), pairs)
    assert odds.shape == (4, 2)
    logits = run.sparse(pairs.tokens[2, 1:, : int(pairs.last[2]) + 1])[0, -1]
    assert float(odds[2, 1]) == pytest.approx(
        float(logits[pairs.answers[2, 0]] - logits[pairs.answers[2, 1]]), abs=1e-4
    )


def test_the_study_tells_what_it_solves_and_says_what_it_does_not(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, runs=(str(run.folder),), out=str(tmp_path / "one"))
    variable_binding.main(options)
    assert "not solved, nothing is told" in capsys.readouterr().out
    monkeypatch.setattr(variable_binding, "solves", lambda accuracy: True)
    variable_binding.main(replace(options, out=str(tmp_path / "two")))
    said = capsys.readouterr().out
    assert "| another name behind, used in one prompt | " in said
    assert "| attn.0 | 0.000 | 1.00 | " in said
