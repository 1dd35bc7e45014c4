"""The evidence of a name: every figure computed another way, no text in both splits, and what makes it poor."""

import random
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from support.helpers import CHANNEL, make_tiny_run, tiny_tokenizer

from bridges.run_folder import Run
from interventions import Channel, activations, channel_evidence, load_dense
from interventions.bundle.evidence import Detection, Evidence
from interventions.finding.detection import auc, best_threshold, fit_probe
from interventions.finding.evidence import with_evidence
from interventions.tasks.marked_text import MarkedText, marked_texts
from interventions.tasks.natural import split_of
from interventions.tasks.of_run import HeldOutTexts
from interventions.tasks.predicates import INSIDE, OUTSIDE, TWIN

TASK = "single_double_quote"
NAMED = replace(CHANNEL, selection={"task": TASK})


@cache
def files(seed: int = 0) -> tuple[str, ...]:
    """Forty files with strings that no template has, and some that they have."""
    rng, words = random.Random(seed), ("red", "cup", "old", "hat", "sky", "dog", "map", "key")

    def line() -> str:
        name, *said = rng.sample(words, 4)
        text = " ".join(said)
        return rng.choice([f'{name} = "{text}"', f"{name} = '{text}'", f'{name}("{text}")', f"{name} = {said[0]}"])

    return tuple("\n".join(line() for _ in range(20)) + "\n" for _ in range(40))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("evidence") / "run")


@pytest.fixture(scope="module")
def marked() -> dict[str, MarkedText]:
    return dict(marked_texts(TASK, files(), tiny_tokenizer(), 64, 100_000, 8192))


@pytest.fixture(scope="module")
def evidence(run: Run) -> Evidence:
    found = channel_evidence(run, NAMED, tokens=100_000, texts=HeldOutTexts("files of a test", files()))
    assert found is not None
    return found


def test_auc_is_the_share_of_pairs_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    inside, rest = (torch.randint(0, 6, (n,), generator=generator).float() for n in (13, 29))
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(inside.tolist(), rest.tolist())]
    assert auc(inside, rest) == pytest.approx(sum(pairs) / len(pairs))


def f1(values: torch.Tensor, inside: torch.Tensor, threshold: float) -> float:
    hits = sum(v >= threshold and i for v, i in zip(values.tolist(), inside.tolist(), strict=True))
    return 2 * hits / (sum(v >= threshold for v in values.tolist()) + int(inside.sum()))


def test_the_threshold_has_the_largest_f1_of_all() -> None:
    generator = torch.Generator().manual_seed(1)
    inside = torch.rand(40, generator=generator) < 0.3
    values = torch.randint(0, 8, (40,), generator=generator) + 2.0 * inside
    chosen = best_threshold(values, inside)
    assert f1(values, inside, chosen) == max(f1(values, inside, v) for v in values.tolist())


def test_the_probe_finds_a_direction_and_judges_tokens_that_it_was_not_fitted_to() -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(600, 5, generator=generator) * 10 + 3
    inside = features[:, 1] + torch.randn(600, generator=generator) > 8
    probe = fit_probe(features[:400], inside[:400])
    values = probe.model(features[400:])
    assert auc(values[inside[400:]], values[~inside[400:]]) > 0.98
    assert float(probe.model.weight[1] / probe.model.weight.norm()) > 0.95
    # What has no signal is told no better than chance where it is left out, however well it is fitted.
    noise, labels = torch.randn(120, 100, generator=generator), torch.rand(120, generator=generator) < 0.5
    fitted = fit_probe(noise, labels)
    assert abs(auc(fitted.left_out[labels], fitted.left_out[~labels]) - 0.5) < 0.2


def test_tokens_are_marked_as_a_reader_marks_them(marked: dict[str, MarkedText]) -> None:
    """By decoding: the quotes of a line up to a token say where it leaves the text."""
    tokenizer = tiny_tokenizer()
    seen = set()
    for text in marked.values():
        for ids, labels, new in zip(text.tokens.tolist(), text.label.tolist(), text.new.tolist(), strict=True):
            assert ids[0] == tokenizer.eos_token_id
            assert labels[0] == -1
            for column in range(1, len(ids)):
                if ids[column] == tokenizer.eos_token_id:
                    assert labels[column] == -1
                    continue
                line = tokenizer.decode(ids[1 : column + 1]).rpartition("\n")[2]
                doubles, singles = line.count('"'), line.count("'")
                wanted = INSIDE if doubles == 1 else TWIN if singles == 1 else OUTSIDE
                assert labels[column] == wanted, line
                assert new[column] == (wanted == OUTSIDE or "(" not in line), line
                seen.add((wanted, new[column]))
    assert seen == {(INSIDE, True), (INSIDE, False), (TWIN, True), (OUTSIDE, True)}


def test_no_text_is_counted_twice_or_in_both_splits(marked: dict[str, MarkedText]) -> None:
    rows = [tuple(row) for text in marked.values() for row in text.tokens.tolist()]
    assert len(set(rows)) == len(rows) > 40
    for split, text in marked.items():
        own = "".join(file for file in files() if split_of(file) == split)
        other = "".join(file for file in files() if split_of(file) != split)
        for row in text.tokens.tolist():
            piece = tiny_tokenizer().decode([id_ for id_ in row if id_ != tiny_tokenizer().eos_token_id])
            assert piece in own
            assert piece not in other
        assert int((text.label >= 0).sum()) <= len(tiny_tokenizer().encode(own))


def test_files_that_resemble_each_other_are_one() -> None:
    twice = (*files(), *(file + "end = 1\n" for file in files()))
    once, both = (marked_texts(TASK, texts, tiny_tokenizer(), 64, 100_000, 8192) for texts in (files(), twice))
    assert [text.files for text in once.values()] == [text.files for text in both.values()]


def test_a_row_begins_where_nothing_is_open() -> None:
    """A long string and a long list are cut off; no row begins in them."""
    lines = 'x = "' + "red cup " * 60 + '"\ny = [\n' + "    'old',\n" * 60 + "]\n"
    texts = [lines + f"z = {n}\n" + "".join(f"w = {n * i}\n" for i in range(99)) for n in range(12)]
    text = marked_texts(TASK, texts, tiny_tokenizer(), 16, 10_000, 8192)["selection"]
    starts = {tiny_tokenizer().decode(row[1:3]) for row in text.tokens.tolist()}
    assert starts == {"x =", "y =", "z =", "w ="}


@pytest.mark.parametrize("source", ["encoder", "sparse"])
def test_the_figures_are_those_of_the_activations(
    run: Run, evidence: Evidence, marked: dict[str, MarkedText], source: str
) -> None:
    dense = load_dense(run.folder)
    read = {s: torch.cat([activations(dense, r, NAMED, source=source) for r in t.tokens.split(32)]) for s, t in marked.items()}  # type: ignore[arg-type]  # fmt: skip  # noqa: E501
    for contexts in ("new", "all"):
        kept = {s: (t.label >= 0) & (t.new if contexts == "new" else True) for s, t in marked.items()}
        values, labels = read["evaluation"][kept["evaluation"]], marked["evaluation"].label[kept["evaluation"]]
        detection: Detection = getattr(getattr(evidence, contexts), source)
        of = {kind: values[labels == kind] for kind in (INSIDE, TWIN, OUTSIDE)}
        assert (detection.inside, detection.twin, detection.outside) == pytest.approx(
            [float(of[kind].mean()) for kind in (INSIDE, TWIN, OUTSIDE)], abs=1e-5
        )
        pairs = (of[INSIDE][:, None] - values[labels != INSIDE][None]).sign()
        assert detection.auc == pytest.approx(float((pairs + 1).mean() / 2), abs=1e-4)
        twins = (of[INSIDE][:, None] - of[TWIN][None]).sign()
        assert detection.auc_twin == pytest.approx(float((twins + 1).mean() / 2), abs=1e-4)
        called = values >= detection.threshold - 1e-6
        assert detection.precision == pytest.approx(float((labels[called] == INSIDE).float().mean()), abs=2e-3)
        assert detection.recall == pytest.approx(float(called[labels == INSIDE].float().mean()), abs=2e-3)
    # The threshold is the best of the selection text's, in the contexts that the verdict is about.
    kept = (marked["selection"].label >= 0) & marked["selection"].new
    values, inside = read["selection"][kept], marked["selection"].label[kept] == INSIDE
    best = max(f1(values, inside, v) for v in values[:: len(values) // 50].tolist())
    assert f1(values, inside, getattr(evidence.new, source).threshold - 1e-6) >= best - 1e-9
    assert evidence.all.encoder.threshold == evidence.new.encoder.threshold


def test_counts_and_excerpts(evidence: Evidence, marked: dict[str, MarkedText]) -> None:
    text, count = marked["evaluation"], evidence.evaluation
    assert count.inside == int((text.label == INSIDE).sum())
    assert count.new_inside == int(((text.label == INSIDE) & text.new).sum()) < count.inside
    assert (count.twin, count.new_twin) == (int((text.label == TWIN).sum()),) * 2
    assert count.files == sum(split_of(file) == "evaluation" for file in files())
    tops, bottoms = [e.value for e in evidence.top], [e.value for e in evidence.bottom]
    assert tops == sorted(tops, reverse=True)
    assert bottoms == sorted(bottoms)
    assert len(tops) == len(bottoms) == 5
    assert min(tops) > evidence.all.encoder.outside > max(bottoms)
    eval_rows = text.tokens.tolist()
    for excerpt in (*evidence.top, *evidence.bottom):
        ids = [*excerpt.before, excerpt.token, *excerpt.behind]
        assert any(ids == row[i : i + len(ids)] for row in eval_rows for i in range(64))


def test_evaluation_files_choose_nothing(run: Run, evidence: Evidence) -> None:
    """With other evaluation files the thresholds stay, of the probe too."""
    other = tuple(f for f in files() if split_of(f) != "evaluation")
    other += tuple(f for f in files(1) if split_of(f) == "evaluation")
    again = channel_evidence(run, NAMED, tokens=100_000, texts=HeldOutTexts("others", other))
    assert again is not None
    assert again.evaluation != evidence.evaluation
    for name in ("encoder", "sparse", "probe"):
        one, two = (getattr(of.new, name) for of in (evidence, again))
        assert one.threshold == pytest.approx(two.threshold, abs=1e-4)
        assert one.auc != two.auc


def test_a_feature_of_member_1_turns_the_values_round(run: Run) -> None:
    code = tuple(f"{file}while {'a' * n} < 1 and b < {n}:\n    return {n}\n" * 2 for n, file in enumerate(files()))
    channel = replace(CHANNEL, selection={"task": "while_return_true"})
    found = channel_evidence(run, channel, tokens=100_000, texts=HeldOutTexts("x", code))
    assert found is not None
    assert found.sign == -1
    text = marked_texts("while_return_true", code, tiny_tokenizer(), 64, 400_000, 8192)["evaluation"]
    inside = text.label == INSIDE
    assert found.evaluation.inside == int(inside.sum())
    dense = load_dense(run.folder)
    for source in ("encoder", "sparse"):
        values = torch.cat([activations(dense, rows, channel, source=source) for rows in text.tokens.split(32)])  # type: ignore[arg-type]
        assert getattr(found.all, source).inside == pytest.approx(-float(values[inside].mean()), abs=1e-5)
    highest = min(float(activations(dense, rows, channel, source="encoder")[mask >= 0].min())
                  for rows, mask in zip(text.tokens.split(32), text.label.split(32), strict=True))  # fmt: skip
    assert found.top[0].value == pytest.approx(-highest, abs=1e-5)


def better(evidence: Evidence, **figures: float) -> Evidence:
    """The evidence with these figures of both readings, in new contexts."""
    new = evidence.new
    return replace(
        evidence, new=replace(new, encoder=replace(new.encoder, **figures), sparse=replace(new.sparse, **figures))
    )


def test_a_poor_name_says_so(evidence: Evidence) -> None:
    good = better(evidence, auc=0.8, precision=0.5)
    assert good.faults == []
    assert good.verdict == "good evidence that it means 'in a double-quoted string'"
    assert "poor" not in repr(replace(NAMED, evidence=good))
    assert "poor" not in repr(NAMED)
    for figures, fault in (
        ({"auc": 0.799, "precision": 0.5}, "AUC off the dense model 0.80, under 0.8"),
        ({"auc": 0.9, "precision": 0.49}, "precision off the dense model 0.49, under 0.5"),
    ):
        poor = better(evidence, **figures)
        assert poor.faults[0] == fault
        assert len(poor.faults) == 2  # in the sparse model as well
        assert poor.verdict.startswith(f"poor evidence that it means 'in a double-quoted string': {fault}")
        assert repr(replace(NAMED, evidence=poor)).endswith("; poor evidence>")
    sparse = replace(good, new=replace(good.new, sparse=replace(good.new.sparse, auc=0.5)))
    assert sparse.faults == ["AUC in the sparse model 0.50, under 0.8"]


def test_where_there_can_be_none(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = HeldOutTexts("three files", files()[:3])
    assert channel_evidence(run, NAMED, texts=texts) is None
    assert "three files give under 30 tokens in a double-quoted string" in caplog.text
    for task in ("var_swap", "my_task", None):
        assert channel_evidence(run, replace(CHANNEL, selection={"task": task})) is None
    gone = run._replace(config=replace(run.config, corpus=str(tmp_path / "gone")))
    assert with_evidence(gone, NAMED) == NAMED
    assert "there is no natural text" in caplog.text


def test_it_is_kept_beside_the_channel(evidence: Evidence) -> None:
    channel: Channel = replace(NAMED, evidence=evidence)
    assert channel.digest == NAMED.digest  # measured, not chosen
    assert asdict(channel)["evidence"]["new"]["probe"]["auc"] == evidence.new.probe.auc
