"""Bracket counting: a model built so that the law of dilution holds, and the study as a command."""

import json
from dataclasses import replace
from pathlib import Path

import bracket_counting
import bracket_laws
import bracket_prompts
import bracket_steering
import pytest
import torch
from carriers import head_nodes, share_of
from support.helpers import make_tiny_run

from bridges.packaged import FOLDER
from bridges.run_folder import Run
from interventions.circuits.node_model import NodeModel, as_nodes
from sparse_model.config import SparseConfig
from sparse_model.data.tokenizer import load_tokenizer
from sparse_model.model.transformer import SparseTransformer

TOKENIZER = load_tokenizer(FOLDER / "demo" / "tokenizer")  # the tests' own has no ` [[`
OPTIONS = bracket_counting.Options(pairs=2, draws=2, numbers=(2, 3, 4))
DETECTOR, EVERY, DEPTH, OPENS = 0, 1, 2, 3
"""Channels of the built model: the opener's depth, a constant, what the head writes, that something opens."""


@torch.no_grad()
def built(points: bool) -> NodeModel:
    """One layer whose second head averages the openers' depth: evenly, or looking at the opener."""
    shape = SparseConfig(
        n_layers=1, d_model=8, d_mlp=8, n_heads=2, d_head=4, n_ctx=64, d_vocab=len(TOKENIZER), bigram="none",
        bias=False, topk_locations=(),
    )  # fmt: skip
    model, encode = SparseTransformer(shape), TOKENIZER.encode
    for parameter in model.parameters():
        parameter.zero_()
    for norm in (model.ln_final, model.blocks[0].ln1, model.blocks[0].ln2):
        norm.weight.fill_(1.0)  # type: ignore[union-attr,operator]
    model.token_embed.weight[:, EVERY] = 1.0
    for opener, depth in (("[", -1.0), ("[[", 1.0)):
        token = encode(f" {opener}")
        assert len(token) == 1
        model.token_embed.weight[token[0], [DETECTOR, OPENS]] = torch.tensor([depth, 1.0])
    second, attention = shape.d_head, model.blocks[0].attn
    query, key, value = attention.qkv.weight.chunk(3)  # type: ignore[union-attr,operator]
    value[second, DETECTOR] = 1.0
    query[second, EVERY], key[second, OPENS] = (1.0, 1.0) if points else (0.0, 0.0)
    attention.out.weight[DEPTH, second] = 1.0  # type: ignore[union-attr,index]
    model.unembedding.weight[encode("x]]")[-1], DEPTH] = 5.0
    return as_nodes(model)


def prompts(split: str) -> dict[int, bracket_prompts.TaskBatch]:
    numbers = [2, 3, 5, 9]
    return bracket_prompts.batches(TOKENIZER, numbers, pairs=4, split=split, seed=0, n_ctx=64)  # type: ignore[arg-type]


@pytest.mark.parametrize("points", [False, True])
def test_the_law_foretells_a_model_in_which_it_holds(points: bool) -> None:
    model, evaluation = built(points), prompts("evaluation")
    roles = bracket_laws.find_roles(model, prompts("selection"), TOKENIZER, OPTIONS)
    assert roles["head"] == [0, 1]
    assert roles["share"] == pytest.approx(1, abs=1e-4)
    assert [found["channel"] for found in roles["detectors"]] == [DETECTOR]
    assert roles["depth"]["channel"] == DEPTH
    assert roles["by_depth"]["1"] == pytest.approx(-roles["by_depth"]["2"])
    assert (roles["heads"]["0.1"]["uneven"] > 0.2) is points
    predicted = bracket_laws.predict(model, roles, evaluation, None)
    measured = bracket_laws.measure(model, roles, {"evaluation": evaluation})["evaluation"]
    for law in ("all heads", "the head alone"):
        torch.testing.assert_close(predicted[law], measured["margins"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(predicted[f"depth, {law}"], measured["depth"], atol=1e-4, rtol=1e-4)
    figures = bracket_laws.compare(predicted, {"evaluation": measured}, sorted(evaluation), OPTIONS)
    assert figures["laws"]["all heads"]["explained"] == pytest.approx(1, abs=1e-4)
    assert (figures["laws"]["even average"]["explained"] > 0.999) is not points
    assert figures["laws"]["no dilution"]["explained"] < 0.99


@torch.no_grad()
def test_a_head_without_the_depth_is_not_found_and_foretells_nothing() -> None:
    model, batch = built(True), prompts("selection")
    assert share_of(model, head_nodes(model, (0, 0)), batch[3]) == pytest.approx(0, abs=1e-6)
    roles = bracket_laws.find_roles(model, batch, TOKENIZER, OPTIONS)
    predicted = bracket_laws.predict(model, roles, batch, None)
    torch.testing.assert_close(predicted["other 0.0"], predicted["no dilution"])


def test_longer_lists_begin_with_the_shorter_ones_and_count_their_tokens() -> None:
    by_number = prompts("selection")
    for (short, _), (long, _) in zip(by_number[3].prompts, by_number[9].prompts, strict=True):
        assert long.startswith(short)
    counts = bracket_prompts.times(by_number[3], 3, 9).unflatten(0, (-1, 2))
    for row, last in enumerate(by_number[3].last.tolist()):
        assert counts[row, 0, last - 4 : last + 1].tolist() == [3, 4, 3, 4, 3]
        assert (counts[row, 0, : last - 4] == 1).all()


def test_where_margins_flip_by_hand() -> None:
    margins = torch.tensor([[-9.0, 9.0], [-2.0, 2.0], [-1.0, -2.0], [1.0, -3.0]])[:, None]
    found = bracket_laws._flips(margins, [2, 3, 5, 9])
    assert found == {"flip [": pytest.approx(7), "flip [[": pytest.approx(4)}
    assert bracket_laws._flips(margins[:2], [2, 3]) == {"flip [": None, "flip [[": None}
    assert bracket_steering.failing([2, 3, 5, 9], margins[:, 0].tolist()) == 5


def test_directions_are_brought_to_the_length_of_others() -> None:
    found = bracket_steering.as_long(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [6.0, 8.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.0, 10.0]]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("brackets") / "run", tokenizer=TOKENIZER)


def test_the_study_registers_compares_and_goes_on(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = replace(OPTIONS, runs=(str(run.folder),), out=str(tmp_path))
    bracket_counting.main(options)
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "prediction-sparse.json").read_text())
    assert record["sha256"] in said.split("## run")[0]
    assert "## run, dense model" in said
    assert (tmp_path / "bracket_counting.png").stat().st_size > 20_000
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    bracket_counting.main(options)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    assert "registered" not in capsys.readouterr().out
    path = tmp_path / "run" / "prediction-sparse.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match="is not what was registered"):
        bracket_counting.main(options)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"prediction-sparse\.json is damaged .*: remove it, and it is made again"):
        bracket_counting.main(options)


def test_too_many_names_are_refused(run: Run, tmp_path: Path) -> None:
    for numbers, words in (((3, 24), "there are 24 names"), ((0,), "at least 1")):
        with pytest.raises(ValueError, match=words):
            bracket_counting.main(replace(OPTIONS, runs=(str(run.folder),), out=str(tmp_path / "o"), numbers=numbers))
    assert not (tmp_path / "o").exists()
    with pytest.raises(ValueError, match="0 prompts of 2 fit into 32 tokens"):
        bracket_prompts.batches(TOKENIZER, [3, 12], pairs=2, split="evaluation", seed=0, n_ctx=32)
