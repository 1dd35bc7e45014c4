"""The report: self-contained, escaped, and equal to the numbers it was made from."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import make_tiny_run
from support.report_page import Page, Token, page_of
from support.report_runs import (
    EVIL,
    QUICK,
    TASK,
    channel,
    circuit,
    full_run,
    steering,
    thorough_steering,
    training_records,
    write_training_records,
)

from bridges.run_folder import Run, update_metrics
from interventions import intervene, load_dense
from interventions.bundle.channels import Channel, read_nodes, save_channel
from interventions.circuits.circuit import load_circuit
from interventions.circuits.node_model import as_nodes
from interventions.circuits.pruning import score
from interventions.report.channels import LENS_TOKENS, logit_lens
from interventions.report.page import write_report
from interventions.report.sites import COLUMNS, GROUPS
from interventions.report.steering import CONTROLS
from interventions.report.texts import blocks, held_out, task_of, visible
from interventions.report.training import MOST_POINTS, history
from interventions.tasks.catalogue import get_task, list_tasks

# The namespace of SVG, and where the plotting library says that it is from: neither is ever fetched.
HARMLESS = ("http://www.w3.org/2000/svg", "https://github.com/leeoniya/uPlot")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has every part of the report."""
    return full_run(tmp_path_factory.mktemp("full") / "run")


@pytest.fixture(scope="module")
def page(full: Run) -> Page:
    return page_of(full)


@pytest.fixture
def bare(tmp_path: Path) -> Run:
    """A run straight after training, not even evaluated."""
    return make_tiny_run(tmp_path / "run", n_layers=1)


def test_nothing_is_fetched(full: Run, page: Page) -> None:
    html = page.html
    for known in HARMLESS:
        html = html.replace(known, "")
    assert not re.search(r"https?://|@import|url\((?!#)|\beval\(|new Function|innerHTML", html)
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "img")
        assert "style" not in attributes  # the policy would not apply it
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert (value or "").startswith(("#", "data:")), (tag, name, value)
            assert not name.startswith("on")
    assert len(html) < 5_000_000
    assert not list(full.folder.glob("*.tmp"))


def test_the_policy_lets_in_only_the_page_itself(page: Page) -> None:
    policy = page.policy
    assert policy["default-src"] == ["'none'"]
    assert policy["require-trusted-types-for"] == ["'script'"]
    code = [raw for raw in page.raw if not raw.startswith("{")]
    digests = [f"'sha256-{base64.b64encode(hashlib.sha256(raw.encode()).digest()).decode()}'" for raw in code]
    assert [*policy["style-src"], *policy["script-src"]] == digests
    assert not {"'unsafe-inline'", "'unsafe-eval'"} & {source for sources in policy.values() for source in sources}


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {v for _, a in page.tags for n, v in a.items() if n in ("href", "xlink:href") and v and v[0] == "#"}
    assert {target[1:] for target in targets} <= set(ids)


def test_every_figure_has_its_data(page: Page) -> None:
    figures = [a["data-chart"] for _, a in page.tags if "data-chart" in a]
    assert sorted(map(str, figures)) == sorted(page.data["charts"])
    assert len(figures) == 5 + 1 + 1 + 1  # training, hybrids, steering, histogram
    for chart in page.data["charts"].values():
        curves = [series["values"] for series in chart["series"]]
        curves += [band[side] for band in chart["bands"] for side in ("low", "high")]
        assert {len(curve) for curve in curves} == {len(chart["x"])}


def test_curves_equal_the_records(full: Run, page: Page) -> None:
    records = training_records(30, full.bridges.n_sites)
    terms = page.data["charts"]["training-terms"]
    assert terms["x"] == [record["step"] for record in records]
    named = {series["name"]: series["values"] for series in terms["series"]}
    assert named["sparse cross-entropy"] == pytest.approx([record["ce"] for record in records], rel=1e-3)
    assert named["NMSE encoders"] == [pytest.approx(np.mean(records[0]["nmse_encode"]), rel=1e-3)] * 30
    sites = page.data["charts"]["training-decode"]["series"]
    assert [series["values"][0] for series in sites] == records[0]["nmse_decode"]
    hybrids = {series["name"]: series["values"] for series in page.data["charts"]["hybrids"]["series"]}
    metrics = json.loads((full.folder / "metrics.json").read_text())
    wanted = [site["ce_sparse_to_dense"] for site in metrics["sites"]]
    assert hybrids["sparse → dense"] == pytest.approx(wanted, rel=1e-3)
    assert hybrids["dense alone"] == [pytest.approx(metrics["dense"]["ce"], rel=1e-3)] * len(wanted)


def test_site_table_equals_metrics(full: Run, page: Page) -> None:
    sites = json.loads((full.folder / "metrics.json").read_text())["sites"]
    _, titles, *rows, last = page.tables["site-table"]
    assert titles == [column.title for column in COLUMNS]
    assert {column.field for column in COLUMNS} == set(sites[0])
    assert sum(span for _, span in GROUPS) == len(COLUMNS)
    for row, site in zip(rows, sites, strict=True):
        assert row == [format(site[column.field], column.form).replace("-", "−") for column in COLUMNS]
    assert last[2] == f"{sum(site['nmse_encode'] for site in sites) / len(sites):.3f}"


def test_overview_equals_metrics(full: Run, page: Page) -> None:
    metrics = json.loads((full.folder / "metrics.json").read_text())
    dense, sparse = metrics["dense"]["ce"], metrics["sparse"]
    for figure in (f"{dense:.3f}", f"{sparse['ce']:.3f}", f"{sparse['ce'] - dense:+.3f}", f"{sparse['nonzeros']:,}"):
        assert figure in page.text
    assert [row[:2] for row in page.tables["activations"][1:]] == [
        [name, f"{active:.1f}"] for name, active in sparse["activation_l0"].items()
    ]
    assert [row[1] for row in page.tables["matrices"][1:]] == [
        f"{entry['nonzeros']:,}" for entry in sparse["matrices"].values()
    ]


def test_steering_numbers_and_controls(page: Page) -> None:
    result = thorough_steering()
    last = page.tables["steering-summary"][-1]
    drawn = ("random_p95", "random_channels_p95", "shuffled_p95", "untrained_p95")
    controls = [*(getattr(result, name)[-1] for name in drawn), result.ridge["2"][-1]]
    controls += [result.difference_of_means[-1], result.exact_patch[-1]]
    assert last[1:4] == ["2 channels", "0.0100", "0.7321(0.654 … 0.765)"]
    assert last[4:] == [f"{value:.4f}" for value in controls]
    assert len(CONTROLS) == len(controls)
    assert "0.8123" in page.text  # two-way
    chart = page.data["charts"]["steering-1"]
    assert chart["bands"][0]["name"] == "5 random directions, 5–95 %"
    assert (chart["bands"][0]["low"], chart["bands"][0]["high"]) == (result.random_p05, result.random_p95)
    named = {series["name"]: series for series in chart["series"]}
    assert named["2 channels"]["values"] == result.channels["2"]
    assert (named["2 channels"]["low"], named["2 channels"]["high"]) == ([0.01, 0.25, 0.6543], [0.01, 0.35, 0.7654])
    assert named["ridge, 2 channels"]["values"] == result.ridge["2"]
    assert named["shuffled decoder, 95th pct"]["values"] == result.shuffled_p95
    assert "trained decoder 0.222, ridge regression 0.111" in page.text


def test_side_effects(page: Page) -> None:
    _, unsteered, steered = page.tables["side-effects"]
    assert steered == ["2 channels", "0.50", "0.6000", "0.0321", "4.50", "5.50", "0.500", "for_while 0.25"]
    assert unsteered[-2:] == ["–", "none solved"]


def test_results_of_earlier_versions_show_what_they_have(bare: Run) -> None:
    update_metrics(bare.folder, steering={TASK: steering()._asdict()})
    page = page_of(bare)
    controls = ["0.0500", "0.0456", "–", "–", "–", "0.4567", "–"]
    assert page.tables["steering-summary"][-1][2:] == ["0.0100", "0.7321", *controls]
    assert "side-effects" not in page.tables
    update_metrics(bare.folder, steering={TASK: steering()._asdict() | {"nonsense": 1}})
    with pytest.raises(ValueError, match=r"metrics\.json: steering of single_double_quote does not read"):
        write_report(bare.folder)


def colour_blocks(page: Page) -> Iterator[list[Token]]:
    return (tokens for tokens in page.examples if tokens)


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
            reads = read_nodes(full.sparse, ids, 1)[0]
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


def test_the_task_table_equals_metrics(full: Run, page: Page) -> None:
    metrics = json.loads((full.folder / "metrics.json").read_text())
    rows = {row[0]: row[1:] for row in page.tables["task-table"][2:]}
    assert list(rows) == list_tasks()
    for name, found in metrics["tasks"].items():
        for at, label in ((0, "dense"), (2, "sparse")):
            score = found.get(label)
            wanted = [f"{score['pair_accuracy']:.2f}", f"{score['p_right']:.2f}"] if score else ["–", "–"]
            assert rows[name][at : at + 2] == wanted, name
    assert rows[TASK][4:7] == ["110", "4", "27.5"]
    assert rows["with_as"][4:] == ["", "", "", metrics["tasks"]["with_as"].get("unsupported", "not solved by <both>")]
    assert re.search(r"circuits have 22.5 times as\s+many edges", page.text)
    assert "sparse model of 1.750 nats with a dense one of 1.500: at unequal loss the ratio says little" in page.text


def test_circuit_data_equals_the_circuit(full: Run, page: Page) -> None:
    found, data = load_circuit(full, TASK), page.data["circuits"][TASK]
    names = [node["name"] for node in data["nodes"]]
    assert names == found.names
    edges = {(names[a], names[b], matrix): weight for a, b, weight, matrix in data["edges"]}
    assert edges == {(e.source, e.target, e.matrix): pytest.approx(e.weight, rel=1e-2) for e in found.edges}
    residual = [(names[a], names[b]) for a, b, kind in data["links"] if kind == "residual"]
    assert ("0.attn.resid_delta.3", "0.mlp.act_in.3") in residual
    assert found.controls is not None
    effects = {node["name"]: node["effect"] for node in data["nodes"]}
    assert effects == {name: pytest.approx(x, rel=1e-3, abs=1e-9) for name, x in found.controls["node_effects"].items()}
    by_rank = sorted(data["nodes"], key=lambda node: node["rank"])
    assert [node["effect"] for node in by_rank] == sorted(effects.values(), reverse=True)
    read = next(node for node in data["nodes"] if node["name"] == "0.mlp.act_in.3")
    assert read["ours"] == "blocks.0.mlp.hook_in[3]"
    assert read["named"] == [["quote_type", "channel-1"]]
    spread = {node["row"] for node in data["nodes"] if node["stream"] == 3}
    assert len(spread) == 1  # a residual channel keeps its row


def test_sizes_are_the_losses_of_the_first_nodes(full: Run, page: Page) -> None:
    found, data = load_circuit(full, TASK), page.data["circuits"][TASK]
    counts, losses = zip(*data["sizes"], strict=True)
    assert counts[0] == 0
    assert counts[-1] == found.n_nodes
    assert len(counts) <= 17
    batch = task_of(full, TASK).sample(64, split="evaluation", seed=full.config.seed)
    model = as_nodes(full.sparse)
    for kept, loss in (
        ({name: torch.zeros_like(mask) for name, mask in found.kept.items()}, losses[0]),
        (found.kept, losses[-1]),
    ):
        assert loss == pytest.approx(score(model, kept, found.ablation, batch, QUICK).loss, rel=1e-3)


def test_examples_are_the_extremes_of_held_out_text(full: Run, page: Page) -> None:
    data = page.data["circuits"][TASK]
    rows = blocks(held_out(full, 16_384), full.config.sparse.n_ctx)
    with torch.no_grad():
        _, cache = full.sparse.run_with_cache(rows, names_filter="blocks.0.mlp.hook_in")
    values = cache["blocks.0.mlp.hook_in"][..., 3]
    node = next(node for node in data["nodes"] if node["name"] == "0.mlp.act_in.3")
    assert node["stats"]["max"] == pytest.approx(float(values.max()), rel=1e-2)
    for windows, extreme in ((node["top"], values.max()), (node["bottom"], values.min())):
        ids, shown, at = windows[0]
        assert shown[at] == pytest.approx(float(extreme), rel=1e-2)
        assert all(str(token) in page.data["tokens"] for token in ids)
        assert abs(windows[0][1][windows[0][2]]) >= abs(windows[-1][1][windows[-1][2]])
    found = load_circuit(full, TASK)
    assert node["ablated"] == pytest.approx(float(found.ablation.values["blocks.0.mlp.hook_in"][0, 3]), rel=1e-2)


def test_circuits_show_their_verdicts_or_a_warning(page: Page) -> None:
    names = [row[0] for row in page.tables["verdicts words"][1:]]
    assert {"sufficiency", "necessity", "minimality"} <= set(names)
    warned = [a for tag, a in page.tags if "uncontrolled" in (a.get("class") or "")]
    assert len(warned) == 1  # the dense model's circuit alone
    assert f"The circuit for {TASK} in the dense model is uncontrolled" in page.text
    assert page.tables["circuit-summary"][2][-1] == "uncontrolled"


def test_a_circuit_that_does_not_read_is_left_out_with_its_reason(bare: Run) -> None:
    circuit(bare)
    circuit(bare, task="no_such_task")
    path = bare.folder / "circuits" / f"{TASK}.json"
    path.write_text(path.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    (bare.folder / "circuits" / "other.json").write_text("{")
    (bare.folder / "circuits" / "renamed.json").write_text('{"task": "../../x", "model": "sparse"}')
    page = page_of(bare)
    assert page.text.count("A circuit is left out") == 3
    assert "of another run" in page.text
    assert list(page.data["circuits"]) == ["no_such_task"]
    assert page.data["circuits"]["no_such_task"]["sizes"] == []
    assert "unknown task" in page.text


def test_controls_that_do_not_read_count_for_none(bare: Run) -> None:
    circuit(bare, controls={"node_effects": {}, "written": "by another version"})
    text = page_of(bare).text
    assert text.count("do not read") == 3  # among the warnings, in the table, at the circuit


def test_untrusted_text_stays_text(bare: Run) -> None:
    save_channel(bare.folder, channel(EVIL, task=None))
    update_metrics(bare.folder, steering={EVIL: steering(EVIL)._asdict()})
    circuit(bare)
    page = page_of(bare)
    assert sum(tag == "script" for tag, _ in page.tags) == 3  # the theme's, the data, the page's
    assert page.text.count(EVIL) >= 3  # the channel, the summary, the task
    data = next(raw for raw in page.raw if raw.startswith("{"))
    assert not set("<>&") & set(data)
    assert EVIL in str(page.data["circuits"][TASK]["nodes"])


def test_missing_parts_name_their_command(bare: Run) -> None:
    page = page_of(bare)
    for command in ("train-bridge", "find-channel", "steer", "find-circuit"):
        assert re.search(rf"sparse-bridges {command} --run \S+", page.text)
    assert re.search(r"sparse-bridges solved-tasks \S+", page.text)
    assert page.data["charts"] == {}
    write_training_records(bare)
    save_channel(bare.folder, channel())
    page = page_of(bare)
    assert "find-channel" not in page.text
    assert len(page.data["charts"]) == 5 + 1


def test_a_channel_of_an_unknown_task_shows_held_out_text(bare: Run) -> None:
    save_channel(bare.folder, channel(task="no_such_task"))
    page = page_of(bare)
    assert "unknown task" in page.text
    assert len(list(colour_blocks(page))) == 4


def test_warnings(bare: Run) -> None:
    save_channel(bare.folder, channel(share=0.7))
    update_metrics(
        bare.folder,
        dense_task={TASK: {"pair_accuracy": 0.5, "p_right": 0.5, "p_wrong": 0.4}},
        steering={TASK: steering(p95=0.8)._asdict()},
    )
    text = page_of(bare).text
    for sentence in (
        "does not solve single_double_quote",
        "70%",
        "above 0.1",
        "no more than the 95th percentile of the control random directions",
    ):
        assert sentence in text


def test_a_good_run_has_no_steering_warning(page: Page) -> None:
    for sentence in ("does not solve", "do not carry", "above 0.1", "no more than"):
        assert sentence not in page.text


def test_errors_name_the_file(bare: Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run at"):
        write_report(tmp_path / "nothing")
    save_channel(bare.folder, Channel(name="far", site=0, indices=(999,), weights=(1.0,)))
    with pytest.raises(ValueError, match=r"channels\.json.*'far'.*999"):
        write_report(bare.folder)
    (bare.folder / "channels.json").unlink()
    (bare.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        write_report(bare.folder)
    (bare.folder / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is damaged"):
        write_report(bare.folder)
    assert not (bare.folder / "report.html").exists()


def test_a_corpus_that_is_gone_is_replaced_by_generated_text(bare: Run) -> None:
    config = json.loads((bare.folder / "config.json").read_text()) | {"corpus": "./gone.txt"}
    (bare.folder / "config.json").write_text(json.dumps(config))
    save_channel(bare.folder, channel())
    assert "Generated document 1" in page_of(bare).text


def test_long_histories_are_thinned() -> None:
    past = history(training_records(5 * MOST_POINTS, 3))
    assert past.nmse_encode.shape == (MOST_POINTS, 3)
    assert past.step[0] == 3.0  # the mean of steps 1 .. 5


def test_histories_with_mixed_paths_alone() -> None:
    records = training_records(4, 3)
    for at, record in enumerate(records):
        del record["kl_dense_to_sparse"], record["kl_sparse_to_dense"]
        if at:
            record["kl_mixed"] = 2.0
    past = history(records)
    assert list(past.kl) == ["kl_mixed"]
    assert np.array_equal(past.kl["kl_mixed"], [np.nan, 2, 2, 2], equal_nan=True)
