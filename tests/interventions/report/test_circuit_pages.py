"""The circuits' pages equal the circuits' files and what the models do."""

import json
import math
import re
from typing import Any

import pytest
import torch
from support.report_page import Page, page_of
from support.report_runs import (
    QUICK,
    SCORES,
    TASK,
    circuit,
)

from bridges.run_folder import Run, update_metrics
from interventions.circuits.circuit import load_circuit
from interventions.circuits.node_model import as_nodes, find_node
from interventions.circuits.pruning import score
from interventions.circuits.pruning_seeds import SeedSummary
from interventions.report import circuits, explorer
from interventions.report.texts import blocks, held_out
from interventions.tasks.of_run import run_task


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
    batch = run_task(full, TASK).sample(64, split="evaluation", seed=full.config.seed)
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


def test_circuits_show_their_controls_or_a_warning(page: Page) -> None:
    names = [row[0] for row in page.tables["controls words"][1:]]
    assert {"sufficiency", "necessity", "minimality"} <= set(names)
    warned = [a for tag, a in page.tags if "uncontrolled" in (a.get("class") or "")]
    assert len(warned) == 1  # the dense model's circuit alone
    assert f"The circuit for {TASK} in the dense model is uncontrolled" in page.text
    assert page.tables["circuit-summary"][2][-1] == "uncontrolled"


def test_a_circuit_that_does_not_read_is_left_out_with_its_reason(bare: Run) -> None:
    circuit(bare)
    circuit(bare, task="no_such_task")
    path = bare.folder / "circuits" / f"{TASK}.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"fingerprint": "0", "sha256": None}))
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


def table_of(page: Page, head: str) -> list[list[str]]:
    """The first table of the circuits' section that begins with a column of this name."""
    return next(table for table in page.sections["circuits"] if table[0][0] == head)


def saved(full: Run, name: str = TASK) -> dict[str, Any]:
    return json.loads((full.folder / "circuits" / f"{name}.json").read_text())


def test_the_sentence_on_a_circuit(full: Run, page: Page) -> None:
    words = " ".join(page.words["circuits"].split())
    for name in (TASK, f"{TASK}-dense"):
        found = saved(full, name)
        assert (
            f"{len(found['nodes']):,} nodes and {len(found['edges']):,} edges reach a calibrated task loss of 0.200 "
            "nats on the selection prompts (whole model 0.100); other nodes are ablated to their means." in words
        )
        assert f"All {len(found['nodes']):,} nodes as a table" in words
    options = re.findall(r"<option value=\"(.*?)\">(.*?)</option>", page.html)
    assert options == [
        (TASK, f"{TASK} · sparse model · {len(saved(full)['nodes'])} nodes"),
        (f"{TASK}-dense", f"{TASK} · dense model · {len(saved(full, f'{TASK}-dense')['nodes'])} nodes"),
    ]


def test_the_table_of_nodes(full: Run, page: Page) -> None:
    found = saved(full)
    edges, effects = found["edges"], found["controls"]["node_effects"]
    table = table_of(page, "node")
    rows = {row[0]: row for row in table[1:]}
    assert sorted(rows) == sorted(found["nodes"])
    for name, row in rows.items():
        shown = float(row[3].replace("−", "-"))
        assert shown == pytest.approx(effects[name], abs=6e-5)
        # Layer, head and channel are the same in OpenAI's name, in ours and in words.
        assert re.findall(r"\d+", row[1]) == re.findall(r"\d+", name)
        assert row[2].endswith(f"layer {name.split('.')[0]}")
        assert row[4] == str(sum(edge["target"] == name for edge in edges))
        assert row[5] == str(sum(edge["source"] == name for edge in edges))
    order = [effects[row[0]] for row in table[1:]]
    assert order == sorted(order, reverse=True)


def test_every_control_from_the_controls_that_were_saved(full: Run, page: Page) -> None:
    controls = saved(full)["controls"]
    rows = {row[0]: row[1:] for row in table_of(page, "control")[1:]}
    alone, removed, moved = controls["sufficiency"], controls["necessity"], controls["interchange"]
    twice, nodes = 2 * controls["target_loss"], len(saved(full)["nodes"])
    assert rows["sufficiency"] == [
        "survived" if alone["loss"] <= twice else "failed",
        f"circuit alone {alone['loss']:.3f}, whole model {alone['whole_loss']:.3f}; pairs right "
        f"{alone['accuracy']:.0%}",
        f"at most {twice:.3g}",
    ]
    for name, loss, random in (
        ("necessity", removed["loss"], removed["random"]),
        ("necessity, calibrated", removed["calibrated"], removed["calibrated_random"]),
    ):
        limit = max([math.log(2) / 2, *random])
        assert rows[name] == [
            "survived" if loss > limit else "failed",
            f"{loss:.3f} without it; without as many others at most {max(random):.3f} in {len(random)} draws",
            f"above {limit:.3f}: every draw, and half of ln 2",
        ]
    idle = sum(effect < 0.01 for effect in controls["node_effects"].values())
    assert rows["minimality"] == [
        "failed" if idle else "survived",
        f"{idle} of {nodes} nodes change the loss by less than 0.01",
        "none",
    ]
    worst = max(moved["random"])
    assert rows["interchange"] == [
        "survived" if moved["share"] > max(worst, 0.5) else "failed",
        f"{moved['share']:.0%} of the log-odds move with {moved['nodes']} nodes; with as many others at most "
        f"{worst:.0%} in {len(moved['random'])} draws",
        f"above {max(worst, 0.5):.0%}: every draw, and half",
    ]
    other = f"{controls['other_ablation']} ablation"
    assert rows[other][0] == ("survived" if controls["other_loss"] <= twice else "failed")
    assert rows[other][1].startswith(f"same circuit {controls['other_loss']:.3f}; pruned so: ")
    frozen = controls["frozen_loss"]
    outcome = "survived" if frozen <= twice else "failed"
    assert rows["frozen norms"] == [outcome, f"same circuit {frozen:.3f}", f"at most {twice:.3g}"]
    assert set(rows) - set(REPRUNINGS) == {
        "sufficiency",
        "necessity",
        "necessity, calibrated",
        "minimality",
        "interchange",
        other,
        "frozen norms",
    }


REPRUNINGS = {
    "nonsense: a coin": "nonsense",
    "nonsense: a rule": "nonsense_rule",
    "redrawn weights": "redrawn",
    "redrawn, frozen norms": "redrawn_frozen",
}


def test_prunings_of_nonsense_from_the_controls_that_were_saved(full: Run, page: Page) -> None:
    rows = {row[0]: row[1:] for row in table_of(page, "control")[1:]}
    nodes = len(saved(full)["nodes"])
    for name, field in REPRUNINGS.items():
        again = saved(full)["controls"][field]
        reached = f"{again['k']} nodes, {again['edges']} edges" if again["k"] is not None else "target not reached"
        assert rows[name] == [
            "survived" if again["k"] is None or again["k"] >= 2 * nodes else "failed",
            f"{reached}; {again['loss_at_k']:.3f} with the best {nodes} nodes, {again['whole_loss']:.3f} with all",
            "not reached, or twice the nodes",
        ]


def test_a_nodes_values_are_those_of_the_whole_model(full: Run, page: Page) -> None:
    """Distribution over held-out text, means by member, prompts and examples of a write, from the model's own pass."""
    data = page.data["circuits"][TASK]
    node = next(node for node in data["nodes"] if node["name"] == "0.attn.resid_delta.3")
    hook = "blocks.0.hook_attn_out"
    assert (node["short"], node["layer"], node["head"], node["stream"]) == ("3", 0, None, 3)
    assert node["place"] == "residual write of attention, layer 0"

    def values(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return full.sparse.run_with_cache(tokens, names_filter=hook)[1][hook][..., 3]

    rows = blocks(held_out(full, 16_384), full.config.sparse.n_ctx)
    shown = values(rows)
    assert node["stats"] == {
        "active": pytest.approx(float((shown != 0).float().mean()), rel=5e-3),
        "min": pytest.approx(float(shown.min()), rel=5e-3),
        "mean": pytest.approx(float(shown.mean()), rel=5e-3, abs=1e-6),
        "max": pytest.approx(float(shown.max()), rel=5e-3),
    }
    batch = run_task(full, TASK).sample(64, split="evaluation", seed=full.config.seed)
    at_last: list[list[float]] = [[], []]
    since: list[list[float]] = [[], []]
    for pair in range(64):
        last = int(batch.last[pair])
        first = int((batch.tokens[pair, 0] != batch.tokens[pair, 1]).nonzero()[0])
        for member in (0, 1):
            one = values(batch.tokens[pair, member][None])[0]
            at_last[member].append(float(one[last]))
            since[member] += one[first : last + 1].tolist()
            if pair < 2:
                listed = node["prompts"][2 * pair + member]
                assert listed == pytest.approx(one[: last + 1].tolist(), rel=5e-3, abs=1e-6)
                tokens = data["prompts"][2 * pair + member]["tokens"]
                assert tokens == batch.tokens[pair, member, : last + 1].tolist()
    for name, by_member in (("last", at_last), ("since", since)):
        wanted = [sum(one) / len(one) for one in by_member]
        assert node["means"][name] == pytest.approx(wanted, rel=5e-3, abs=1e-6)
    peaks = [*((max, window) for window in node["top"]), *((min, window) for window in node["bottom"])]
    for furthest, (tokens, given, at) in peaks:
        texts = [row for row in rows.tolist() if any(row[i : i + len(tokens)] == tokens for i in range(len(row)))]
        found = [values(torch.tensor([row]))[0].tolist() for row in texts]
        places = [
            one[i : i + len(tokens)]
            for row, one in zip(texts, found, strict=True)
            for i in range(len(row))
            if row[i : i + len(tokens)] == tokens
        ]
        assert any(given == pytest.approx(place, rel=5e-3, abs=1e-6) for place in places)
        assert given[at] == furthest(given)


def test_tokens_that_the_stream_ties_to_a_channel(full: Run, page: Page) -> None:
    """By hand: the embedding's column, and the unembedding's times the final norm's gain, largest magnitudes first."""
    ways = page.data["circuits"][TASK]["stream"]["3"]
    embed = full.sparse.token_embed.weight[:, 3].tolist()
    gain = full.sparse.ln_final.weight[3].item()
    unembed = [weight * gain for weight in full.sparse.unembedding.weight[:, 3].tolist()]
    for name, weights in (("embed", embed), ("unembed", unembed)):
        order = sorted(range(len(weights)), key=lambda token: -abs(weights[token]))[:6]
        wanted = [(token, weights[token]) for token in order if weights[token]]
        assert [token for token, _ in ways[name]] == [token for token, _ in wanted]
        assert [weight for _, weight in ways[name]] == pytest.approx([weight for _, weight in wanted], rel=5e-3)


def test_sizes_in_between_are_those_of_the_first_nodes(full: Run, page: Page) -> None:
    found, data = load_circuit(full, TASK), page.data["circuits"][TASK]
    batch = run_task(full, TASK).sample(64, split="evaluation", seed=full.config.seed)
    by_rank = [node["name"] for node in sorted(data["nodes"], key=lambda node: node["rank"])]
    count, loss = data["sizes"][len(data["sizes"]) // 2]
    assert 0 < count < found.n_nodes
    kept = {name: torch.zeros_like(mask) for name, mask in found.kept.items()}
    for name in by_rank[:count]:
        for hook, channel in find_node(found.shape, name):
            kept[hook][channel] = True
    assert loss == pytest.approx(score(as_nodes(full.sparse), kept, found.ablation, batch, QUICK).loss, rel=1e-3)
    assert data["target"] == 0.6


def test_notes_count_what_is_left_out(bare: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    circuit(bare)
    edges = saved(bare)["edges"]
    for module in (circuits, explorer):
        monkeypatch.setattr(module, "MOST_EDGES", 3)
    monkeypatch.setattr(circuits, "DETAILED", 4)
    page = page_of(bare)
    assert f"Only the 3 strongest of {len(edges):,} edges are drawn." in page.words["circuits"]
    assert "Prompts and examples are kept for the 4 most important nodes." in page.words["circuits"]
    data = page.data["circuits"][TASK]
    strongest = sorted((abs(edge["weight"]) for edge in edges), reverse=True)[:3]
    assert [abs(edge[2]) for edge in data["edges"]] == pytest.approx(strongest, rel=1e-2)
    assert sum("top" in node for node in data["nodes"]) == 4


def test_a_circuit_on_evaluation_prompts(bare: Run) -> None:
    seeds = tuple(
        SeedSummary(seed, 12, 9, 0.14, 0.16, agreed, taken)
        for seed, agreed, taken in ((0, 1.0, True), (1, 0.23, False), (None, 0.5, False))
    )
    circuit(bare, faithfulness=SCORES, seeds=seeds, ngram_floor=0.31)
    circuit(bare, model="dense")
    update_metrics(bare.folder, tasks={TASK: {"dense": {"pair_accuracy": 1.0, "p_right": 0.5, "loss": 0.1}}})
    page = page_of(bare)
    words = " ".join(page.words["circuits"].split())
    assert "Failed. On evaluation prompts its task loss is 0.606 nats, its target 0.6." in words
    assert "a task loss of 0.606 nats and 25% of the pairs right (counting alone 31%)." in words
    assert "it carries 2.8% of the whole model's log-odds; the calibration's scale is 1." in words
    assert "Prunings with other seeds share with it 0.23 of the nodes of either." in words
    assert page.tables["partial words"][1:] == [
        ["none", "0.010", "100%", "0.000"],
        ["each with p = 0.1, mean of 2 draws", "0.200", "70%", "0.020"],
        ["each with p = 0.1, worst draw", "0.300", "50%", "0.030"],
        ["all", "0.650", "75%", "0.200"],
        ["worst subset found (49% of them)", "11.500", "0%", "0.690"],
    ]
    assert page.tables["seeds words"][1:] == [
        ["seed 0, this one", "12", "9", "0.140", "0.160", "1.00"],
        ["seed 1", "12", "9", "0.140", "0.160", "0.23"],
        ["consensus", "12", "9", "0.140", "0.160", "0.50"],
    ]
    assert words.count("it was found by an earlier version") == 1  # the dense model's
    assert any(f"The circuit for {TASK} in the sparse model failed" in warning for warning in page.warnings)
    assert page.tables["circuit-summary"][1][-1].replace("; ", ";") == "failed on evaluation prompts;uncontrolled"
    row = next(row for row in page.tables["task-table"] if row[0] == TASK)
    assert row[-1] == "its circuit failed: task loss 0.606 on evaluation prompts, target 0.6"
