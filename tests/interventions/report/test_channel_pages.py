"""The channels' pages equal channels.json and what the models do."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.report_page import Page, Token, page_of
from support.report_runs import (
    TASK,
    channel,
    evidence,
)

from bridges.run_folder import Run
from interventions import intervene, load_dense
from interventions.bundle.channels import residual_reads, save_channel
from interventions.report.channels import LENS_TOKENS, logit_lens
from interventions.report.texts import visible
from interventions.tasks.catalogue import get_task


def colour_blocks(page: Page) -> Iterator[list[Token]]:
    return (tokens for tokens in page.examples["channels"] if tokens)


def test_coloured_activations_equal_the_reads(full: Run, page: Page) -> None:
    batch = get_task(TASK, full.tokenizer, max_tokens=64).sample(64, split="evaluation", seed=full.config.seed)
    coloured = list(colour_blocks(page))
    assert len(coloured) == 4 + 4
    for number, tokens in enumerate(coloured):
        ids = torch.tensor([[int(re.search(r"token (\d+)", token.title)[1]) for token in tokens]])  # type: ignore[index]
        if number < 4:
            pair, member = divmod(number, 2)
            assert torch.equal(ids[0], batch.tokens[pair, member, : int(batch.last[pair]) + 1])
        assert ids[0, 0] == full.tokenizer.eos_token_id
        with torch.no_grad():
            reads = residual_reads(full.sparse, ids, 1)[0]
        wanted = (1.0 * reads[:, 3] - 0.5 * reads[:, 7]) / (1.0**2 + 0.5**2)
        for token, value in zip(tokens, wanted.tolist(), strict=True):
            assert float(token.title.split()[0]) == pytest.approx(value, abs=6e-4)
            assert token.classes[:1] == ("p" if value > 0 else "m" if value < 0 else "")


def test_text_is_whole_and_line_ends_are_visible(full: Run, page: Page) -> None:
    batch = get_task(TASK, full.tokenizer, max_tokens=64).sample(2, split="evaluation", seed=full.config.seed)
    shown = "".join(token.text for token in next(colour_blocks(page)))
    assert shown == "<|endoftext|>" + batch.prompts[0][0].replace("\n", "↵\n")


def test_characters_that_would_not_show_are_named(full: Run) -> None:
    hidden = full.tokenizer.encode("a\u202eb\x85c\x00", add_special_tokens=False)
    assert visible(full.tokenizer, hidden) == "a‹202E›b‹85›c␀"


def test_the_histogram_counts_every_token_once(page: Page) -> None:
    for series in page.data["charts"]["histogram-1"]["series"]:
        assert sum(series["values"][:-1]) == pytest.approx(1, abs=1e-3)  # the last value repeats the last bin


def test_logit_lens_is_the_change_of_the_logits(full: Run) -> None:
    """The lens's numbers are those of a small step of the channel in the last stream, at the mean scale of streams."""
    dense = load_dense(full.folder)
    raised, lowered = logit_lens(full, dense, channel())
    assert len(raised) == len(lowered) == LENS_TOKENS
    vector = intervene(dense, channel(), delta=1.0, where="stream").vector()
    stream = torch.randn(vector.shape)
    stream = (stream - stream.mean()) / stream.std(correction=0) * full.bridges.std_dense[-1]
    with torch.no_grad():
        ends = [full.dense.unembed((stream + sign * 1e-3 * vector)[None, None])[0, 0] for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / 2e-3
    # The norm also rescales the stream itself, which the lens leaves out: subtract that part.
    centred = vector - vector.mean()
    along = (centred @ stream) / stream.square().sum()
    with torch.no_grad():
        own, zero = (full.dense.unembed(x[None, None])[0, 0] for x in (stream, torch.zeros_like(stream)))
    wanted = slope + along * (own - zero)
    assert raised[0].logit == pytest.approx(float(wanted.max()), rel=2e-2)
    assert lowered[0].logit == pytest.approx(float(wanted.min()), rel=2e-2)


def test_continuations_are_those_of_intervene(full: Run, page: Page) -> None:
    dense = load_dense(full.folder)
    batch = get_task(TASK, full.tokenizer, max_tokens=64).sample(64, split="evaluation", seed=full.config.seed)
    prompt, other = (batch.tokens[:1, member, : int(batch.last[0]) + 1] for member in (0, 1))
    with intervene(dense, channel(), toward=other):
        steered = dense.generate(prompt, max_new_tokens=16, do_sample=False, verbose=False)[0, prompt.shape[1] :]
    assert visible(full.tokenizer, steered.tolist()) in page.text
    assert page.text.count("unsteered") >= 4


def test_a_channel_of_an_unknown_task_shows_held_out_text(bare: Run) -> None:
    save_channel(bare.folder, channel(task="no_such_task"))
    page = page_of(bare)
    assert "unknown task" in page.text
    assert len(list(colour_blocks(page))) == 4


def test_where_a_channel_is_and_how_it_was_chosen(full: Run, page: Page) -> None:
    """By hand from the channel of `full_run`, as channels.json has it."""
    words = " ".join(page.words["channels"].split())
    assert (
        "Site 1, read by mlp.0. Positive in double quotes. Chosen by joint patching on 48 selection pairs of" in words
    )
    weights, rules, sites, sets = page.sections["channels"][-4:]
    assert weights == [
        ["index", "weight", "mean, first prompt", "mean, second prompt", "alone"],
        ["3", "+1.000", "+0.51", "−0.75", "+1.38"],
        ["7", "−0.500", "−0.25", "+0.38", "−0.62"],
    ]
    assert rules[1:] == [
        ["share of the effect", "0.95", "at least 0.9", "met"],
        ["number of indices", "2", "at most 4", "met"],
    ]
    assert sites[1:] == [["0", "attn.0", "0.910", "0.420"], ["1", "mlp.0", "0.730", "0.640"]]
    assert sets[1:] == [["1", "3", "50.0 %", "0.75", "0.321"], ["2", "3, 7", "95.0 %", "1.25", "0.654"]]
    chosen = re.findall(r'<tr class="chosen"><th>(\d)</th>', page.html)
    assert chosen == ["1", "2"]  # the site, and the size


def test_the_key_has_the_largest_activation_of_the_examples(page: Page) -> None:
    shown = [abs(float(token.title.split()[0])) for tokens in colour_blocks(page) for token in tokens]
    low, high = re.findall(r'<i class="[mp]10">([+−][\d.]+)</i>', page.html)[:2]
    assert (low, high) == (f"−{max(shown):.2f}", f"+{max(shown):.2f}")


def test_shades_are_tenths_of_the_largest(page: Page) -> None:
    tokens = [token for tokens in colour_blocks(page) for token in tokens]
    values = [float(token.title.split()[0]) for token in tokens]
    largest = max(map(abs, values))
    for token, value in zip(tokens, values, strict=True):
        shade = int(token.classes[1:] or 0)
        assert abs(shade - 10 * abs(value) / largest) <= 0.51 or (shade == 1 and value)


def test_a_tokens_title_names_the_parts(full: Run, page: Page) -> None:
    for tokens in colour_blocks(page):
        ids = [int(token.title.split("token ")[1].split()[0]) for token in tokens]
        with torch.no_grad():
            reads = residual_reads(full.sparse, torch.tensor([ids]), 1)[0]
        for token, read in zip(tokens, reads, strict=True):
            parts = dict(re.findall(r"(\d+): ([+-][\d.]+)", token.title.replace("−", "-")))
            wanted = {str(i): float(read[i]) for i in (3, 7) if read[i] != 0}
            assert {i: float(part) for i, part in parts.items()} == pytest.approx(wanted, abs=6e-3)


def test_the_histogram(full: Run, page: Page) -> None:
    """Counted by hand, from the first token that differs to the last, over 64 evaluation pairs."""
    chart = page.data["charts"]["histogram-1"]
    batch = get_task(TASK, full.tokenizer, max_tokens=64).sample(64, split="evaluation", seed=full.config.seed)
    values: list[list[float]] = [[], []]
    for pair in range(64):
        first = int((batch.tokens[pair, 0] != batch.tokens[pair, 1]).nonzero()[0])
        for member in (0, 1):
            with torch.no_grad():
                read = residual_reads(full.sparse, batch.tokens[pair, member][None], 1)[0]
            activation = (read[:, 3] - 0.5 * read[:, 7]) / 1.25
            values[member] += activation[first : int(batch.last[pair]) + 1].tolist()
    edges = chart["x"]
    assert (edges[0], edges[-1]) == pytest.approx((min(map(min, values)), max(map(max, values))), rel=1e-3)
    for series, own in zip(chart["series"], values, strict=True):
        assert len(series["values"]) == len(edges) == 41
        # A value at an edge may fall on either side of the rounded edge.
        for at in (10, 20, 30):
            inner = [1 / len(own) for value in own if value < edges[at]]
            at_edge = sum(abs(value - edges[at]) < 2e-3 * abs(edges[-1]) for value in own) / len(own)
            assert sum(series["values"][:at]) == pytest.approx(sum(inner), abs=2e-3 + at_edge)
    zeros = [
        f"{sum(value == 0 for value in own) / len(own):.0%} of the {('first', 'second')[m]} prompts'"
        for m, own in enumerate(values)
    ]
    assert chart["caption"].startswith("Share of the tokens of either prompt of 64 evaluation pairs")
    assert chart["caption"].endswith(f"Exactly zero are {', '.join(zeros)}.")


def test_the_lens_is_shown_as_it_is_computed(full: Run, page: Page) -> None:
    raised, lowered = logit_lens(full, load_dense(full.folder), channel())
    shown = page.sections["channels"][:2]
    for table, tokens in zip(shown, (raised, lowered), strict=True):
        assert [row[1] for row in table] == [f"{token.logit:+.3f}".replace("-", "−") for token in tokens]


def test_deltas_are_half_of_the_largest_activation(full: Run, page: Page) -> None:
    shown = [abs(float(token.title.split()[0])) for tokens in colour_blocks(page) for token in tokens]
    deltas = re.findall(r"<span>delta ([+−][\d.]+)</span>", page.html)
    half = f"{max(shown) / 2:.2f}"
    assert len(deltas) == 4
    assert {delta[1:] for delta in deltas} <= {half, f"{(max(shown) + 5e-4) / 2:.2f}", f"{(max(shown) - 5e-4) / 2:.2f}"}
    assert [delta[0] for delta in deltas] == ["−", "+"] * 2


def test_the_page_opens_with_what_the_name_is_worth(bare: Run) -> None:
    """By hand from `evidence`; a poor name says so."""
    save_channel(bare.folder, replace(channel(), evidence=evidence()))
    page = page_of(bare)
    words = " ".join(page.words["channels"].split())
    assert words.index("What the name is worth") < words.index("On code")
    assert "Good evidence that it means 'in a double-quoted string'. Measured on 4,001 tokens in a double" in words
    assert "502 in a single-quoted string and 30,003 others, in 19 held-out files of <stdlib>" in words
    assert "thresholds and probe are of 17 other files" in words
    detections, top, bottom = page.sections["channels"][:3]
    assert detections[1:] == [
        ["new", "off the dense model", "0.91", "0.86", "0.61", "0.31", "+1.50", "−0.50", "−1.25", "+0.25"],
        ["", "sparse model", "0.93", "0.88", "0.62", "0.32", "+1.51", "−0.51", "−1.26", "+0.26"],
        ["", "probe", "0.97", "0.92", "0.63", "0.33", "+1.52", "−0.52", "−1.27", "+0.27"],
        ["all", "off the dense model", "0.93", "0.88", "0.71", "0.41", "+1.60", "−0.60", "−1.35", "+0.35"],
        ["", "sparse model", "0.95", "0.90", "0.72", "0.42", "+1.61", "−0.61", "−1.36", "+0.36"],
        ["", "probe", "0.97", "0.92", "0.73", "0.43", "+1.62", "−0.62", "−1.37", "+0.37"],
    ]
    assert "New ones: 404 tokens inside and 305 in the twin class" in page.html
    for shown, excerpt, value in ((top, evidence().top[0], "+3.25"), (bottom, evidence().bottom[0], "−2.75")):
        ids = [*excerpt.before, excerpt.token, *excerpt.behind]
        assert shown == [[value, excerpt.label, visible(bare.tokenizer, ids)]]
    save_channel(bare.folder, replace(channel(), evidence=replace(evidence(auc=0.7), sign=-1)))
    words = " ".join(page_of(bare).words["channels"].split())
    assert "Poor evidence that it means 'in a double-quoted string': AUC off the dense model 0.70, under 0.8" in words
    assert "Values are turned round" in words


def test_a_name_without_evidence_says_so(page: Page) -> None:
    assert "Not measured: nothing says so far" in " ".join(page.words["channels"].split())
