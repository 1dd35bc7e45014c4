"""How a circuit computes, on the page: each number taken in another way, and the true story of a known circuit."""

import dataclasses
import re
from html import unescape
from typing import Any

import pytest
import torch
from support.report_page import Page, page_of
from support.report_runs import QUICK, SCORES, TASK, circuit
from support.solver import solver, solver_batch

from bridges.run_folder import Run
from interventions.circuits.ablation import Calibration, measure_ablation
from interventions.circuits.circuit import load_circuit, make_circuit, save_circuit
from interventions.circuits.gates import take
from interventions.circuits.node_model import NodeEdit, SparseNodes, as_nodes, find_node, locations
from interventions.circuits.pruning import score
from interventions.report import mechanism as told_page
from interventions.report.explorer import explorer_data
from interventions.report.importance import by_importance, effects_of
from interventions.report.mechanism import Mechanism, mechanism
from interventions.tasks.base import TaskBatch
from interventions.tasks.of_run import run_task


def article(page: Page, key: str = TASK) -> str:
    """The markup of a circuit's section on how it computes."""
    html = page.html[page.html.index(f'data-circuit="{key}"') :]
    return html[html.index('<div class="mechanism">') : html.index('<details class="node-table">')]


def plain(html: str) -> str:
    return " ".join(unescape(re.sub("<[^>]*>", "", html)).replace("−", "-").split())


def stories(page: Page, key: str = TASK) -> dict[str, str]:
    """The paragraph on each node, by its name."""
    found = re.findall(r'<div class="told".*?<p><b><code>(.*?)</code></b>(.*?)</p>', article(page, key), re.DOTALL)
    return {name: plain(story) for name, story in found}


def batch_of(run: Run) -> TaskBatch:
    return run_task(run, TASK).sample(64, split="evaluation", seed=run.config.seed)


def values_of(run: Run, name: str, tokens: torch.Tensor) -> torch.Tensor:
    """A node's values by the sparse model's own cache."""
    ((hook, channel),) = find_node(run.sparse.cfg, name)
    with torch.no_grad():
        return run.sparse.run_with_cache(tokens, names_filter=hook)[1][hook].flatten(2)[..., channel]


def by_pair(run: Run, name: str) -> dict[str, list[tuple[float, float]]]:
    """At the last token, and on average since the first differing one: a node's values in both members of each pair."""
    batch = batch_of(run)
    found: dict[str, list[tuple[float, float]]] = {"last": [], "since": []}
    for pair, last in enumerate(batch.last.tolist()):
        first = int((batch.tokens[pair, 0] != batch.tokens[pair, 1]).nonzero()[0])
        both = values_of(run, name, batch.tokens[pair])
        found["last"].append((float(both[0, last]), float(both[1, last])))
        since = both[:, first : last + 1].mean(1)
        found["since"].append((float(since[0]), float(since[1])))
    return found


def test_every_node_is_told_in_the_order_of_computation(full: Run, page: Page) -> None:
    found = load_circuit(full, TASK)
    assert found.controls is not None
    effects = found.controls["node_effects"]
    chosen = sorted(effects, key=lambda name: -effects[name])[:30]
    told = stories(page)
    assert list(told) == [name for name in found.names if name in set(chosen)]
    assert len(found.names) > 30
    words = plain(article(page))
    assert f"The 30 nodes with the largest effect are told; {len(found.names) - 30}" in words
    failed = [name for name, row in controls(page).items() if row == "failed"]
    assert f"It fails {len(failed)} of its {len(controls(page))} controls: {', '.join(failed)}." in words
    for name, story in told.items():
        (change,) = re.findall(r"the circuit's loss (?:rises|falls) by ([\d.]+)|less than 0.01 nats \((.*?)\)", story)
        shown = float(change[0] or change[1]) * (-1 if "falls by" in story else 1)
        assert shown == pytest.approx(effects[name], abs=6e-4)
        assert ("changes by less" in story) == (abs(effects[name]) < 0.01)


def controls(page: Page) -> dict[str, str]:
    table = next(table for table in page.sections["circuits"] if table[0][0] == "control")
    return {row[0]: row[1] for row in table[1:]}


def test_values_by_member_and_how_often_they_tell_them_apart(full: Run, page: Page) -> None:
    html, told = article(page), stories(page)
    parts = dict(zip(told, html.split('<div class="told"')[1:], strict=True))
    detecting = 0
    for name, story in told.items():
        pairs = by_pair(full, name)
        rows = re.findall(r"<tr><th>(at the last|from the first).*?</th>(.*?)</tr>", parts[name])
        largest = float(values_of(full, name, batch_of(full).tokens.flatten(0, 1)).abs().max())
        best = 0.0
        for (_, cells), (place, both) in zip(rows, pairs.items(), strict=True):
            given = [plain(cell) for cell in re.findall("<td>(.*?)</td>", cells)]
            shares = [sum(sign * (a - b) > 1e-4 * largest for a, b in both) / 64 for sign in (1, -1)]
            assert given[2:] == [f"{share:.0%}" for share in shares]
            best = max(best, *shares)
            if place == "last":
                means = [sum(values) / 64 for values in zip(*both, strict=True)]
                assert [float(mean) for mean in given[:2]] == pytest.approx(means, rel=6e-3, abs=1e-6)
        detecting += best >= 0.9
        assert ("It detects the difference" in story) == (best >= 0.9)
        if best:
            assert f"in {best:.0%} of the pairs" in story
    assert 0 < detecting < 30
    assert f"{detecting} of the 30 nodes below detect which prompt it is" in plain(html)


def test_weights_in_the_words_are_those_of_the_edges(full: Run, page: Page) -> None:
    found, told = load_circuit(full, TASK), stories(page)
    seen = 0
    for name, story in told.items():
        for clause, end, other in (("It feeds", "source", "target"), ("It is fed by", "target", "source")):
            match = re.search(rf"{clause} (.*?)\. ", story)
            for node, weight in re.findall(r"(\d\S+) with weight ([-+][\d.e-]*\d)", match[1] + " ") if match else ():
                (edge,) = [e for e in found.edges if (getattr(e, end), getattr(e, other)) == (name, node)]
                assert float(weight) == pytest.approx(edge.weight, rel=6e-3)
                seen += 1
    assert seen > 20


def test_the_stream_in_the_words(full: Run, page: Page) -> None:
    """Writers and readers of a channel, and the weights of the embedding and the unembedding."""
    told, found = stories(page), load_circuit(full, TASK)
    tokens = batch_of(full).tokens
    differing = set(tokens.transpose(1, 2)[tokens[:, 0] != tokens[:, 1]].flatten().tolist())
    read = "0.mlp.act_in.3"
    story = told[read]
    assert "The write 0.attn.resid_delta.3 adds to that channel before." in story
    shown = [
        float(w) for w in re.findall(r"\(([-+][\d.e-]+)\)", story.split("embedding writes it for")[1].split(". ")[0])
    ]
    wanted = sorted((full.sparse.token_embed.weight[token, 3].item() for token in differing), key=lambda w: -abs(w))
    assert shown == pytest.approx(wanted[:4], rel=6e-3)
    write = next(name for name in told if ".resid_delta." in name)
    channel, after = int(write.split(".")[-1]), found.names[found.names.index(write) :]
    later = [name for name in after if name.endswith(f"act_in.{channel}")]
    assert all(name in told[write] for name in later[:4])
    assert ("No node of the circuit reads that channel later." in told[write]) == (not later)
    answers = set(batch_of(full).answers.flatten().tolist())
    gain = full.sparse.ln_final.weight[channel]
    shown = [float(w) for w in re.findall(r"\(([-+][\d.e-]+)\)", told[write].split("unembedding")[1].split(". ")[0])]
    wanted = [(full.sparse.unembedding.weight[token, channel] * gain).item() for token in answers]
    assert sorted(shown) == pytest.approx(sorted(wanted), rel=6e-3)


def test_attention_in_the_words_is_that_of_the_pattern(full: Run, page: Page) -> None:
    found, batch = load_circuit(full, TASK), batch_of(full)
    edit = found.ablation.edit(dict(found.kept), torch.zeros(1, 1, dtype=torch.long))
    patterns: dict[str, list[torch.Tensor]] = {"whole": [], "alone": []}
    for name, then in (("whole", None), ("alone", edit)):
        hooks = [(f"blocks.{at}.attn.hook_pattern", lambda x, hook, n=name: patterns[n].append(x)) for at in (0, 1)]
        with torch.no_grad(), full.sparse.hooks(fwd_hooks=hooks):
            as_nodes(full.sparse).logits(batch.tokens.flatten(0, 1), then)
    first = [int((a != b).nonzero()[0]) for a, b in batch.tokens.unbind(0)]
    told = {name: story for name, story in stories(page).items() if ".head" in name}
    assert told
    for name, story in told.items():
        layer, head = int(name[0]), int(re.findall(r"head(\d+)", name)[0])
        wanted = []
        for kind in ("whole", "alone"):
            rows = [patterns[kind][layer][row, head, int(batch.last[row // 2])] for row in range(128)]
            wanted.append(sum(float(row[first[i // 2]]) for i, row in enumerate(rows)) / 128)
            others = [(float(r.sum()) - float(r[first[i // 2]])) / int(batch.last[i // 2]) for i, r in enumerate(rows)]
            wanted.append(sum(others) / 128)
        sentence = story[story.index("From the last token") :].split(". ")[0]
        shown = [float(number) for number in re.findall(r"\d\.\d+", sentence)]
        assert shown == pytest.approx(wanted, abs=6e-3)
    words = plain(article(page))
    back = sum(int(last) - at for last, at in zip(batch.last, first, strict=True)) / 64
    assert f"they begin to differ {back:.1f} tokens before the last on average" in words


def test_the_table_of_edges(full: Run, page: Page) -> None:
    """Weights from the file; effects by an edit of the model's own hooks."""
    found = load_circuit(full, TASK)
    assert found.controls is not None
    told = set(stories(page))
    rows = re.findall(
        r"<tr><th>(.*?)</th><td.*?>(.*?)</td><td.*?>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", article(page)
    )
    table = [[plain(cell) for cell in row] for row in rows if "circuit-1-node" in row[0]]
    between = {(*e[:2], e.matrix): e.weight for e in found.edges if {e.source, e.target} <= told}
    assert len(table) == len(between)
    effects = [float(row[4]) for row in table]
    assert effects == sorted(effects, reverse=True)
    some = take(batch_of(full), torch.arange(32))
    model, sources = as_nodes(full.sparse), [edge.source for edge in found.edges]
    base = score(model, found.kept, found.ablation, some, QUICK).loss
    measured = 0
    for source, target, matrix, weight, effect in table:
        assert float(weight) == pytest.approx(between[source, target, matrix], abs=6e-5)
        if sources.count(source) == 1:
            assert float(effect) == pytest.approx(found.controls["node_effects"][source], abs=6e-5)
        elif measured < 4:
            assert float(effect) == pytest.approx(cut(full, source, target, some) - base, abs=2e-4)
            measured += 1
    assert measured == 4


class Patched(SparseNodes):
    """A model that does something more with its values after the edit that it is given."""

    def __init__(self, run: Run, then: NodeEdit) -> None:
        super().__init__(run.sparse)
        self._then = then

    def logits(self, tokens: torch.Tensor, edit: Any = None, last: Any = None) -> torch.Tensor:
        return super().logits(tokens, lambda name, values: self._then(name, edit(name, values)), last)


def cut(run: Run, source: str, target: str, batch: TaskBatch) -> float:
    """Loss of the circuit with what a target has without a source put there."""
    found = load_circuit(run, TASK)
    ((source_place, source_channel),), ((place, channel),) = (find_node(found.shape, n) for n in (source, target))
    fewer = {name: mask.clone() for name, mask in found.kept.items()}
    fewer[source_place][source_channel] = False
    taken: list[torch.Tensor] = []

    def take_it(name: str, values: torch.Tensor) -> torch.Tensor:
        if name == place:
            taken.append(values[..., channel].clone())
        return values

    def put_it(name: str, values: torch.Tensor) -> torch.Tensor:
        parts = list(values.unbind(-1))
        if name == place:
            parts[channel] = taken[0]
        return torch.stack(parts, -1)

    score(Patched(run, take_it), fewer, found.ablation, batch, QUICK)
    return score(Patched(run, put_it), found.kept, found.ablation, batch, QUICK).loss


def told_solver(run: Run) -> Mechanism:
    """The hand-made model's circuit with all but its one path left out, and a node that does nothing."""
    model = solver()
    nodes, batch = as_nodes(model), solver_batch(16)
    kept = {at.name: torch.zeros(at.width, dtype=torch.bool) for at in locations(model.cfg)}
    for name in ("0.mlp.act_in.0", "0.mlp.post_act.5", "0.mlp.resid_delta.7", "1.attn.q.head1.ch2"):
        ((place, channel),) = find_node(model.cfg, name)
        kept[place][channel] = True
    ablation = measure_ablation(nodes, torch.tensor([[1, 2, 3, 4, 5, 0, 2, 1]]))
    fields = {"task": "solver", "fingerprint": "", "loss": 0.0, "unpruned_loss": 0.0}
    config = dataclasses.asdict(QUICK)
    found = make_circuit(
        nodes, kept, tied_qk=False, ablation=ablation, calibration=Calibration(1.0, {}), config=config, **fields
    )
    effects = effects_of(nodes, found, batch)
    ranked = by_importance(found, effects)
    rows = torch.randint(6, (4, 8))
    data = explorer_data(run._replace(sparse=model), nodes, found, {}, ranked, effects, batch, rows, 400).data
    return mechanism(nodes, found, data | {"sizes": [(4, 0.0)]}, ranked, effects, batch, run.tokenizer, [], 1)


def test_the_story_of_a_known_circuit_is_the_true_one(bare: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens 1 and 2 set channel 0, neuron 5 reads it and writes channel 7, which the answers' logits read."""
    monkeypatch.setattr(told_page, "inline", lambda tokenizer, token: f"<{token}>")
    of_solver = told_solver(bare)
    assert (
        plain(of_solver.opening)
        == "16 pairs of prompts, one with <1>, the other with <2>; they begin to differ in the last token."
    )
    told = {node.name: plain(node.story) for node in of_solver.told}
    assert of_solver.detecting == 4  # the query too, by itself: it feeds on nothing of the circuit
    assert told["0.mlp.act_in.0"] == (
        "What the MLP of layer 0 reads from channel 0 of the residual stream. It detects the difference: at the last "
        "token it is +1.42 with <1> and -1.65 with <2> on average, and higher with <1> in 100% of the pairs. No node "
        "of the circuit adds to that channel before. Of the tokens in which the prompts differ, the embedding writes "
        "it for <1> (+1) and <2> (-1). It feeds the neuron 0.mlp.post_act.5 with weight +1 (effect +0.689). Without "
        "it the circuit's loss rises by 0.689 nats."
    )
    assert told["0.mlp.post_act.5"] == (
        "Neuron 5 of the MLP of layer 0. It detects the difference: at the last token it is +1.32 with <1> and "
        "-0.0833 with <2> on average, and higher with <1> in 100% of the pairs. It is fed by the read 0.mlp.act_in.0 "
        "with weight +1. It feeds the write 0.mlp.resid_delta.7 with weight +1 (effect +0.689). Without it the "
        "circuit's loss rises by 0.689 nats."
    )
    assert told["0.mlp.resid_delta.7"].endswith(
        "It is fed by the neuron 0.mlp.post_act.5 with weight +1. No node of the circuit reads that channel later. "
        "The unembedding reads it for <3> (+1) and <4> (-1). Without it the circuit's loss rises by 0.689 nats."
    )
    assert "No node of the circuit feeds it. In the attention scores" in told["1.attn.q.head1.ch2"]
    assert told["1.attn.q.head1.ch2"].endswith("Without it the circuit's loss changes by less than 0.01 nats (0).")
    raw = "".join(node.story for node in of_solver.told) + of_solver.opening
    assert "&lt;1&gt;" in raw  # what a token spells is never markup
    assert not re.search(r"<\d", raw)


def test_what_a_circuit_cannot_tell_is_said(bare: Run) -> None:
    """A failed circuit says so first; one without prompts has weights alone; one without nodes is its frame."""
    circuit(bare, faithfulness=SCORES)
    circuit(bare, task="no_such_task")
    found = circuit(bare, task="with_as")
    save_circuit(bare.folder, dataclasses.replace(found, nodes=dict.fromkeys(found.nodes, ()), edges=()))
    page = page_of(bare)
    failed = plain(article(page)).removeprefix("How it computes ")
    assert failed.startswith("Failed. This circuit missed its target on evaluation prompts")
    unknown = article(page, "no_such_task")
    assert "Failed" not in unknown
    assert not re.search(r"detect|loss (rises|falls|changes)|From the last token", plain(unknown.split("<h5>", 1)[1]))
    assert re.search(r"with weight [-+]", plain(unknown).replace("−", "-"))
    assert "nodes with the largest weights are told" in plain(unknown) or "left out" not in plain(unknown)
    assert plain(article(page, "with_as")).startswith("How it computes It has no nodes: what does the task")
