"""Every reasonable spelling of an argument means the same, live and saved; everything else is one sentence."""

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interventions import Channel, Intervention, intervene, intervene_vector, load_hf
from interventions.bundle.channels import load_channels


@pytest.fixture(scope="module")
def hf(folder):
    return load_hf(folder)


def steered(model, handle: Intervention, tokens: torch.Tensor) -> torch.Tensor:
    with handle:
        out = model(tokens)
    return getattr(out, "logits", out)


MASK = [False] * 5 + [True, True] + [False] * 5
ROWS = [MASK, [True] + [False] * 11]

POSITIONS: list[tuple[Any, list[Any]]] = [
    (5, [np.int64(5), np.array(5), torch.tensor(5), [5], (5,), {5}, np.array([5]), torch.tensor([5]), [np.int32(5)]]),
    ([5, 6], [range(5, 7), {5, 6}, np.array([5, 6]), torch.tensor([6, 5]), slice(5, 7), MASK, np.array(MASK)]),
    (
        [5, 6],
        [[np.bool_(x) for x in MASK], [torch.tensor(5), 6], torch.tensor(MASK), slice(np.int64(5), torch.tensor(7))],
    ),
    ([5, 6], [[5, 6, 5], range(6, 4, -1), lambda t: np.array([MASK, MASK]), lambda t: [MASK, MASK], [MASK, MASK]]),
    (-1, [np.int8(-1), slice(-1, None), [-1, 11], range(-1, 0)]),
    (torch.tensor(ROWS), [ROWS, np.array(ROWS), tuple(map(tuple, ROWS)), [np.array(row) for row in ROWS]]),
    ([], [(), np.array([]), torch.tensor([]), range(0), [False] * 12, slice(3, 3)]),
]


@pytest.mark.parametrize(("expected", "spellings"), POSITIONS, ids=range(len(POSITIONS)))
def test_spellings_of_positions(dense, hf, tokens, tmp_path: Path, expected: Any, spellings: list[Any]) -> None:
    for model in (dense, hf):
        answer = steered(model, intervene(model, "pair", delta=6, positions=expected), tokens)
        for i, spelling in enumerate(spellings):
            handle = intervene(model, "pair", delta=6, positions=spelling)
            assert torch.equal(steered(model, handle, tokens), answer), spelling
            if not callable(spelling) and model is hf:
                handle.save(tmp_path / str(i))
                assert torch.equal(steered(hf, Intervention.load(tmp_path / str(i), hf), tokens), answer), spelling
    plain = steered(dense, intervene(dense, "pair", delta=0), tokens)
    assert torch.equal(steered(dense, intervene(dense, "pair", delta=6, positions=expected), tokens), plain) == (
        isinstance(expected, list) and not expected
    )


NO_POSITIONS = [True, np.bool_(False), 5.0, np.float64(5), "5", b"5", {5: 1}, [1, True], [5.0], [None], ["1"]]
NO_POSITIONS += [torch.tensor(True), torch.tensor([[3], [5]]), [[3], [5]], [[True], [True, False]], torch.tensor([1.5])]
NO_POSITIONS += [np.array([[1, 2]]), object(), torch.ones(2, 2, 2, dtype=torch.bool), slice(0.5, None)]
NO_POSITIONS += [slice(None, None, 0), slice(True, None)]


@pytest.mark.parametrize("positions", NO_POSITIONS, ids=range(len(NO_POSITIONS)))
def test_what_is_no_position_is_one_sentence(dense, positions: Any) -> None:
    with pytest.raises(ValueError, match=r"^positions"):
        intervene(dense, "pair", delta=6, positions=positions)


AMOUNTS = [3, 3.0, np.int64(3), np.float32(3), np.array(3), torch.tensor(3), torch.tensor(3.0), [3], (3, 3.0)]
AMOUNTS += [np.array([3, 3]), torch.tensor([3, 3]), torch.tensor([3.0], dtype=torch.float64)]


@pytest.mark.parametrize("kind", ["delta", "set_to"])
def test_spellings_of_amounts(dense, hf, tokens: torch.Tensor, tmp_path: Path, kind: str) -> None:
    for model in (dense, hf):
        answer = steered(model, intervene(model, "pair", **{kind: 3}), tokens)
        for i, given in enumerate(AMOUNTS):
            handle = intervene(model, "pair", **{kind: given})
            assert torch.allclose(steered(model, handle, tokens), answer, atol=1e-6), given
            if model is hf:
                handle.save(tmp_path / str(i))
                assert torch.allclose(steered(hf, Intervention.load(tmp_path / str(i), hf), tokens), answer, atol=1e-6)
        # One per row, also where there are as many rows as tokens.
        square = torch.randint(1, 384, (4, 4))
        rows = steered(model, intervene(model, "pair", **{kind: [1.0, -2, 3, 0.5]}), square)
        for row, amount in enumerate((1.0, -2, 3, 0.5)):
            alone = steered(model, intervene(model, "pair", **{kind: amount}), square[row : row + 1])
            assert torch.allclose(rows[row], alone[0], atol=1e-5)
        with pytest.raises(ValueError, match=f"{kind} has 3 rows but the batch has 2"):
            steered(model, intervene(model, "pair", **{kind: [1, 2, 3]}), tokens)


BAD = [True, "3", [True, False], [[1.0, 2.0]], [], np.zeros((2, 2)), Decimal(3), 1j, object(), [None], ["a"]]
BAD += [float("inf"), float("nan"), 1e308, 10**400, torch.tensor(float("nan")), [1.0, float("-inf")], np.float64(1e300)]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_what_is_no_amount_is_one_sentence(dense, bad: Any) -> None:
    for kind in ("delta", "set_to"):
        with pytest.raises(ValueError, match=rf"^{kind}"):
            intervene(dense, "pair", **{kind: bad})
    with pytest.raises(ValueError, match=r"^(strength|delta)"):
        intervene(dense, "pair", delta=1, strength=bad)
    if not isinstance(bad, list | np.ndarray):
        with pytest.raises(ValueError, match=r"^the weight of 'pair'"):
            intervene(dense, {"pair": bad}, delta=1)


def test_too_large_a_change_is_one_sentence_and_no_nan(dense, hf, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="delta times its strength and weight is too large"):
        intervene(dense, {"pair": 1e20}, delta=1e20)
    for model in (dense, hf):
        for where in ("read", "stream"):
            for site in ("attn.0", "mlp.1", "unembed"):
                huge = intervene(model, f"{site}.read.5", delta=1e30, where=where)
                with pytest.raises(ValueError, match="no longer finite, or too large"):
                    steered(model, huge, tokens)


def test_no_rows_no_tokens_and_too_many_are_one_sentence(dense, hf, tokens: torch.Tensor) -> None:
    for model in (dense, hf):
        for empty in (tokens[:0], tokens[:, :0]):
            with pytest.raises(ValueError, match=r"the model was given . rows of .* tokens: give at least one of each"):
                steered(model, intervene(model, "pair", delta=1), empty)
        with pytest.raises(ValueError, match="has 65 tokens but the model's context holds 64"):
            model(torch.randint(384, (1, 65)))
    for use in (dense, dense.to_tokens, dense.generate):
        with pytest.raises(ValueError, match="tokens but the model's context holds 64"):
            use("x = 1\n" * 60)
    assert dense.to_tokens("x = 1\n" * 60, truncate=True).shape == (1, 64)


def test_spellings_of_counterfactual_tokens(dense, hf, tokens: torch.Tensor) -> None:
    other = tokens.flip(1)
    for model in (dense, hf):
        answer = steered(model, intervene(model, "pair", toward=other), tokens)
        for spelling in (other.numpy(), other.tolist(), other.int(), [row.numpy() for row in other]):
            assert torch.equal(steered(model, intervene(model, "pair", toward=spelling), tokens), answer)
        single = steered(model, intervene(model, "pair", toward=other[:1]), tokens[:1])
        for spelling in (other[0], other[0].tolist(), np.array(other[0])):
            assert torch.equal(steered(model, intervene(model, "pair", toward=spelling), tokens[:1]), single)
    wrong: list[Any] = [
        "a text",
        ["a text"],
        3,
        [],
        tokens[:0],
        tokens.float(),
        tokens > 3,
        [[1, 2], [3]],
        {"input_ids": 1},
    ]
    wrong += [[384], [-1], torch.zeros(1, 1, 3).long(), torch.ones(1, 65).long(), object()]
    for bad in wrong:
        with pytest.raises(ValueError, match=r"^toward|^the sequence has 65 tokens"):
            intervene(dense, "pair", toward=bad)


def test_spellings_of_sites_and_vectors(dense, hf, tokens: torch.Tensor) -> None:
    vector = torch.linspace(-1, 2, 16)
    for model in (dense, hf):
        answer = steered(model, intervene_vector(model, 2, vector), tokens)
        for site in ("attn.1", np.int64(2), torch.tensor(2)):
            for spelling in (
                vector,
                vector.numpy(),
                vector.tolist(),
                vector.expand(2, 12, 16),
                vector.expand(1, 12, 16),
            ):
                assert torch.allclose(
                    steered(model, intervene_vector(model, site, spelling), tokens), answer, atol=1e-6
                )
    for site in ("attn.7", "attn", "", True, 2.0, None, -1, 5, [2], torch.tensor([1, 2])):
        with pytest.raises(ValueError, match=r"^site"):
            intervene_vector(dense, site, vector)
    bad: list[Any] = [
        "v",
        vector > 0,
        torch.ones(()),
        torch.ones(12, 16),
        torch.ones(1, 1, 1, 16),
        vector * float("nan"),
    ]
    for given in [*bad, vector * 1e38 * 1e38, [1, "a"], None]:
        with pytest.raises(ValueError, match=r"^vector"):
            intervene_vector(dense, 2, given)


def test_channels_are_named_before_anything_is_computed(dense, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(dense), "forward", lambda *a, **k: pytest.fail("computed"))
    with pytest.raises(KeyError, match="unknown channel 'pear': did you mean pair"):
        intervene(dense, ["pair", "pear"], toward=[1])
    for channel in (3, b"pair", ["pair", 3], None, {3: 1.0}, object()):
        with pytest.raises(ValueError, match=r"^channel"):
            intervene(dense, channel, delta=1)
    assert len(intervene(dense, {"pair", "attn.0.read.1"}, delta=1).edits) == 2
    for index in (-1, True):
        with pytest.raises(ValueError, match=r"index .* is not an int from 0 on"):
            Channel(name="x", site=1, indices=(index,), weights=(1.0,))  # type: ignore[arg-type]
    for options in (
        {"site": -1},
        {"site": True},
        {"weights": (float("nan"),)},
        {"weights": (0.0,)},
    ):
        with pytest.raises(ValueError, match="channel 'x': "):
            Channel(**{"name": "x", "site": 1, "indices": (1,), "weights": (1.0,)} | options)  # type: ignore[arg-type]
    for options in ({"site": 7}, {"indices": (32,)}):
        channel = Channel(**{"name": "x", "site": 1, "indices": (1,), "weights": (1.0,)} | options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is out of range"):
            intervene(dense, channel, delta=1)


def test_other_words_are_one_sentence(dense) -> None:
    for options in ({"where": "both"}, {"where": None}, {"where": ["read"]}, {"steps": "all "}, {"steps": None}):
        with pytest.raises(ValueError, match=r"^(where|steps)=.*use 'prompt', 'gen|^where=.*: use 'read'"):
            intervene(dense, "pair", delta=1, **options)
    for length in (0, -1, 65, 1.5, True, "12", [12]):
        with pytest.raises(ValueError, match=r"^prompt_length"):
            intervene(dense, "pair", delta=1, prompt_length=length)
    assert intervene(dense, "pair", delta=1, prompt_length=np.int64(12)).edits[0].prompt_length == 12


DAMAGES = ['"where": "read"|"where": "both"', '"steps": "all"|"steps": "some"', "3,\n   11|-1,\n   11"]
DAMAGES += [
    "3,\n   11|true,\n   11",
    '"delta": 6|"delta": 1e999',
    '"delta": 6|"delta": "six"',
    '"site": 2,|"site": true,',
]
DAMAGES += [
    '"strength": 1.0|"strength": true',
    '"positions": 5|"positions": 500',
    '"positions": 5|"positions": [1, true]',
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_saved_handle_is_read_like_a_live_one_is_built(hf, tmp_path: Path, damage: str) -> None:
    intervene(hf, "pair", delta=6, positions=5, strength=1.0).save(tmp_path / "handle")
    path = tmp_path / "handle" / "intervention.json"
    text, (old, new) = path.read_text(), damage.split("|")
    changed = text.replace(old, new)
    if changed == text:
        flat = " ".join(text.split())
        changed = flat.replace(" ".join(old.split()), new)
        assert changed != flat
    path.write_text(changed)
    if "1e999" not in damage:
        with pytest.raises(ValueError, match=r"intervention\.json is not as it was written"):
            Intervention.load(tmp_path / "handle", hf)
    path.write_text(re.sub(r',\s*"sha256": "\w+"', "", changed))
    with pytest.raises(ValueError, match=r"is damaged|is not a valid Stored: edits"):
        Intervention.load(tmp_path / "handle", hf)


def test_a_damaged_channel_is_not_taken_for_another(tmp_path: Path) -> None:
    entry = '{"x": {"name": "x", "site": 1, "indices": [%s], "weights": [1.0]}}'
    for index in ("-1", "true", "1.0"):
        (tmp_path / "channels.json").write_text(entry % index)
        with pytest.raises(ValueError, match=r"channels\.json is damaged"):
            load_channels(tmp_path)
