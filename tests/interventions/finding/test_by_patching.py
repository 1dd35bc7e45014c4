"""Finding channels: the search against brute force, and the site test on models whose answer is known."""

import itertools
import json
from pathlib import Path

import compare_channels
import pytest
import torch
from support.helpers import make_tiny_run

from bridges.hybrid import residuals, suffix
from bridges.run_folder import Run, fingerprint
from interventions.bundle.channels import Channel, Rule, load_channels, residual_reads, save_channel
from interventions.circuits.ablation import Calibration, measure_ablation
from interventions.circuits.circuit import Circuit, make_circuit, save_circuit
from interventions.circuits.node_model import as_nodes, locations
from interventions.cli.find_channel import Options, main
from interventions.finding.by_circuit import channel_by_circuit, read_channels
from interventions.finding.by_patching import SET_SHARE, ChannelSearch, channel_by_patching, search_channels
from interventions.finding.patching import (
    SiteEffect,
    eligibility_rule,
    eligible_sites,
    flipped,
    log_p,
    site_effects,
)
from interventions.finding.read_patch import ReadPatch
from interventions.tasks.base import TaskBatch
from interventions.tasks.catalogue import TASKS, get_task


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_tiny_run(tmp_path / "run")


@pytest.fixture
def batch(run: Run) -> TaskBatch:
    return get_task("single_double_quote", run.tokenizer).sample(6, split="selection", seed=0)


def test_patching_the_whole_read_equals_running_from_the_other_read(run: Run, batch: TaskBatch) -> None:
    """Written out by hand at an attention site, on the sparse model's own modules."""
    tokens, other, answers, last = flipped(batch)
    with torch.no_grad():
        patch = ReadPatch(run, batch, 2)
        block = run.sparse.blocks[1]
        here, there = residuals(run.sparse, tokens)[2], residuals(run.sparse, other)[2]
        write = block.attn.sparsify("attn_out", block.attn(block.ln1(there)))
        logits = suffix(run.sparse, 3, here + write, tokens)
        assert patch.base + patch.whole == pytest.approx(float(log_p(logits, answers, last).mean()), abs=1e-5)
        assert patch.base == pytest.approx(float(log_p(run.sparse(tokens), answers, last).mean()), abs=1e-5)
        assert patch.effect([]) == 0


def test_search_is_exact_on_singles_and_close_to_brute_force_on_pairs(run: Run, batch: TaskBatch) -> None:
    search = search_channels(run, batch, 2, largest=2, beam=32, candidates=32)
    patch = ReadPatch(run, batch, 2)
    singles = [patch.effect([c]) for c in range(32)]
    best = max(patch.effect(list(pair)) for pair in itertools.combinations(range(32), 2))
    assert search.sets[1] == [max(range(32), key=singles.__getitem__)]
    assert search.share[1] == pytest.approx(max(singles) / patch.whole, rel=1e-4)
    assert search.share[2] * patch.whole == pytest.approx(best, rel=1e-4)


def test_named_channel_is_positive_for_member_0_and_the_smallest_sufficient_set(run: Run, batch: TaskBatch) -> None:
    channel = channel_by_patching(run, "quote_type", "single_double_quote", batch, site=2)
    nodes = [residual_reads(run.sparse, batch.tokens[:, m], 2) for m in (0, 1)]
    differs = (nodes[0] != nodes[1]).any(-1)
    assert channel.value(nodes[0])[differs].mean() > channel.value(nodes[1])[differs].mean()
    assert max(abs(w) for w in channel.weights) == 1
    shares = {int(n): share for n, share in channel.selection["share"].items()}
    enough = [n for n in range(1, 5) if shares[n] >= SET_SHARE]
    assert len(channel.indices) == (enough[0] if enough else 4)
    assert channel.selection["split"] == "selection"


def test_site_test_sees_where_the_answer_is(run: Run, batch: TaskBatch) -> None:
    """Patching all but the last token of the embedding gives the counterfactual prompt itself, of site 2L nothing."""
    tokens, other, answers, last = flipped(batch)
    effects = site_effects(run.dense, batch)
    body = run.dense.hf.transformer
    with torch.no_grad():
        full = float(log_p(run.dense(other), answers, last).exp().mean())
        none = float(log_p(run.dense(tokens), answers, last).exp().mean())
        here, there = residuals(run.dense, tokens)[3], residuals(run.dense, other)[3]
        logits = run.dense.unembed(here + body.h[1].mlp(body.h[1].ln_2(there)))
        read = float(log_p(logits, answers, last).exp().mean())
    assert effects[0].p_stream == pytest.approx(full, rel=1e-4)
    assert effects[4].p_stream == pytest.approx(none, rel=1e-4)
    assert effects[4].p_read == pytest.approx(full, rel=1e-4)
    assert effects[3].p_read == pytest.approx(read, rel=1e-4)


def test_eligible_sites() -> None:
    def effects(*pairs: tuple[float, float]) -> list[SiteEffect]:
        return [SiteEffect(i, str(i), stream, read) for i, (stream, read) in enumerate(pairs)]

    assert eligible_sites(effects((0.9, 0.9), (0.1, 0.7), (0.1, 0.1), (0.0, 1.0))) == [0, 1]
    assert eligible_sites(effects((0.9, 0.2), (0.8, 0.3), (0.1, 0.1), (0.0, 1.0))) == [1]
    assert eligible_sites(effects((0.3, 0.2), (0.2, 0.3), (0.1, 0.1), (0.0, 1.0))) == [0]
    # Ordinary text: the counterfactual prompts themselves have .42, the prompts .08, and halfway is .25.
    natural = effects((0.425, 0.089), (0.423, 0.427), (0.36, 0.24), (0.359, 0.369), (0.086, 0.106), (0.08, 0.42))
    assert eligible_sites(natural) == [1, 3]
    assert eligibility_rule(natural, 3).threshold == pytest.approx(0.25)
    assert eligible_sites(effects((0.3, 0.1), (0.3, 0.1), (0.1, 0.1), (0.08, 0.42))) == [1]


def found(whole: float, *shares: float) -> ChannelSearch:
    sizes = range(1, len(shares) + 1)
    sets = {n: list(range(n)) for n in sizes}
    return ChannelSearch(sets, dict(zip(sizes, shares, strict=True)), torch.zeros(32), whole, torch.ones(32))


@pytest.mark.parametrize(
    ("p_read", "searches", "chosen"),
    [
        # A single channel's nine times next to nothing is not taken for a large share.
        ({1: 0.99, 3: 0.99}, {1: found(7.0, 0.7, 0.95), 3: found(0.005, 9.1)}, 1),
        # Fewer channels do not make up for a read that decides less surely ...
        ({1: 0.99, 3: 0.8}, {1: found(7.0, 0.7, 0.95), 3: found(7.0, 0.95)}, 1),
        # ... but one that the sparse model does not hang on does not come into question.
        ({1: 0.99, 3: 0.8}, {1: found(0.01, 1.0), 3: found(7.0, 0.7, 0.95)}, 3),
        ({1: 0.99, 3: 0.95}, {1: found(7.0, 0.7, 0.95), 3: found(5.0, 0.95)}, 3),
        ({1: 0.99, 3: 0.95}, {1: found(7.0, 0.7, 0.99), 3: found(5.0, 0.7, 0.95)}, 3),  # of equal sets the last
        # The surest is looked for among those.
        ({1: 0.8, 2: 0.99, 3: 0.6}, {1: found(3.0, 0.7, 0.95), 2: found(0.1, 1.0), 3: found(4.0, 0.95)}, 1),
    ],
)
def test_the_site_is_one_that_both_models_read_and_then_the_one_with_the_smallest_set(
    run: Run,
    batch: TaskBatch,
    monkeypatch: pytest.MonkeyPatch,
    p_read: dict[int, float],
    searches: dict[int, ChannelSearch],
    chosen: int,
) -> None:
    effects = [SiteEffect(i, "", 0.1, p_read.get(i, 0.1)) for i in range(5)]
    monkeypatch.setattr("interventions.finding.by_patching.site_effects", lambda *_: effects)
    monkeypatch.setattr(
        "interventions.finding.by_patching.search_channels", lambda run, batch, site, **_: searches[site]
    )
    channel = channel_by_patching(run, "quote_type", "single_double_quote", batch)
    assert channel.site == chosen
    assert channel.selection["site_whole_effect_nats"] == {str(i): round(s.whole, 4) for i, s in searches.items()}


def circuit_with(run: Run, task: str = "single_double_quote", **nodes: list[int]) -> Circuit:
    """A circuit of the sparse model whose nodes are channels of the locations `blocks_L_PLACE_hook`."""
    kept = {at.name: torch.zeros(at.width, dtype=torch.bool) for at in locations(run.sparse.cfg)}
    for name, channels in nodes.items():
        layer, place = name.split("_", 1)
        kept[f"blocks.{layer.removeprefix('layer')}.{place}"][channels] = True
    return make_circuit(
        as_nodes(run.sparse),
        kept,
        tied_qk=False,
        task=task,
        fingerprint=fingerprint(run),
        loss=0.1,
        unpruned_loss=0.0,
        calibration=Calibration(1.0, {}),
        ablation=measure_ablation(run.sparse, torch.randint(384, (2, 8)), "zero"),
    )


def reads(**by_site: list[int]) -> dict[str, list[int]]:
    """Channels of reads by site: site2=[...]."""
    places = {"site0": "layer0_attn.hook_in", "site1": "layer0_mlp.hook_in", "site2": "layer1_attn.hook_in"}
    return {(places | {"site3": "layer1_mlp.hook_in"})[site]: channels for site, channels in by_site.items()}


def test_a_circuit_s_reads_are_found_by_site(run: Run) -> None:
    circuit = circuit_with(run, **reads(site0=[3], site3=[1, 30]), **{"layer0_mlp.hook_post": [2]})
    assert read_channels(circuit, 32) == {0: [3], 3: [1, 30]}


def test_the_channel_is_the_circuit_s_best_nodes_at_the_last_read_that_decides(run: Run, batch: TaskBatch) -> None:
    """All channels of the first two reads and a few of later ones: against the effects themselves."""
    nodes = {0: list(range(32)), 1: list(range(32)), 2: [4, 5, 6], 3: [7]}
    circuit = circuit_with(run, **reads(**{f"site{i}": channels for i, channels in nodes.items()}))
    channel = channel_by_circuit(run, "c", circuit, batch)
    tokens, other, answers, last = flipped(batch)
    effects = {i: ReadPatch(run, batch, i).effect(channels) for i, channels in nodes.items()}
    with torch.no_grad():
        exchanged = float((log_p(run.sparse(other), answers, last) - log_p(run.sparse(tokens), answers, last)).mean())
    decides = [i for i, effect in effects.items() if effect >= exchanged / 2]
    site = decides[-1] if decides else max(effects, key=lambda i: effects[i])
    patch = ReadPatch(run, batch, site)
    assert channel.site == site
    assert channel.indices[0] == max(nodes[site], key=lambda c: patch.effect([c]))
    assert set(channel.indices) <= set(nodes[site])
    assert len(channel.indices) <= 4
    count = len(channel.indices)
    assert channel.selection["share"][str(count)] == pytest.approx(
        patch.effect(list(channel.indices)) / patch.whole, abs=1e-3
    )
    means = channel.selection["circuit"]["read_effect_nats"]
    assert means == {str(i): pytest.approx(effect, abs=1e-3) for i, effect in effects.items()}
    at_three = channel_by_circuit(run, "c", circuit, batch, site=3)
    assert (at_three.site, at_three.indices, at_three.weights) == (3, (7,), at_three.weights)
    assert abs(at_three.weights[0]) == pytest.approx(1)


def test_a_circuit_without_the_reads_asked_for_is_refused(run: Run, batch: TaskBatch) -> None:
    with pytest.raises(ValueError, match="single_double_quote has no node that a sublayer reads"):
        channel_by_circuit(run, "c", circuit_with(run, **{"layer0_mlp.hook_post": [2]}), batch)
    with pytest.raises(ValueError, match=r"site=1: the circuit for single_double_quote reads at sites 0, 2"):
        channel_by_circuit(run, "c", circuit_with(run, **reads(site0=[1], site2=[3])), batch, site=1)


def test_the_scripts_name_a_circuit_s_channel_and_compare_runs(
    run: Run, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    task, folder = "bracket_brace", str(run.folder)
    with pytest.raises(FileNotFoundError, match=rf"sparse-bridges find-circuit --run {folder} --task {task}"):
        main(Options(run=folder, task=task, source="circuit"))
    save_circuit(run.folder, circuit_with(run, task, **reads(site3=[7, 9])))
    main(Options(run=folder, task=task, source="circuit", pairs=4))
    main(Options(run=folder, task=task, name="mine", pairs=4, site=2))
    channels = load_channels(run.folder)
    assert list(channels) == [TASKS[task].channel, "mine"]
    assert channels["bracket_type"].selection["circuit"]["nodes"] == 2
    assert set(channels["bracket_type"].indices) <= {7, 9}
    assert "the channel means little" in caplog.text  # random weights read nothing
    said = " ".join(capsys.readouterr().out.split())
    for channel in channels.values():
        assert channel.evidence is not None
        assert channel.evidence.verdict in said
        assert channel.evidence.faults  # a channel of random weights means nothing
        assert "new off the dense model " + " ".join(channel.evidence.new.encoder.cells()) in said
    compare_channels.main(compare_channels.Options(runs=(folder,), task=task))
    heads, _, first, second = capsys.readouterr().out.splitlines()
    assert heads.count("|") == first.count("|") == second.count("|")
    assert "| bracket_type | circuit of 2 nodes | 3 |" in first
    assert "| mine | steering | 2 |" in second
    with pytest.raises(ValueError, match=rf"has no channel for for_while: find one with .* --run {folder}"):
        compare_channels.main(compare_channels.Options(runs=(folder,), task="for_while"))


def limits(channel: Channel) -> list[tuple[str, int | float, int | float, bool]]:
    return [(rule.bound, rule.threshold, rule.reached, rule.passed) for rule in channel.rules]


def test_a_channel_carries_the_rules_that_chose_it(run: Run, batch: TaskBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: half of the largest read, nine tenths of the surest site, nine tenths of the read, four indices."""
    effects = [SiteEffect(i, "", 0.02, p) for i, p in enumerate((0.1, 0.96, 0.1, 0.91, 0.98))]
    searches = {1: found(8.0, 0.7, 0.95), 3: found(5.0, 0.7, 0.8, 0.85, 0.89, 0.99)}
    monkeypatch.setattr("interventions.finding.by_patching.site_effects", lambda *_: effects)
    monkeypatch.setattr(
        "interventions.finding.by_patching.search_channels", lambda run, batch, site, **_: searches[site]
    )
    channel = by_patching(run, batch)
    assert channel.site == 1
    assert limits(channel) == [
        ("more than", 0.5, 0.96, True),
        ("at least", 4.0, 8.0, True),
        ("at least", pytest.approx(0.9 * 0.96), 0.96, True),
        ("at least", 0.9, 0.95, True),
        ("at most", 4, 2, True),
    ]
    # Where a site was asked for, it was not chosen; where no set of four is enough, the channel says so.
    assert limits(by_patching(run, batch, site=3)) == [("at least", 0.9, 0.89, False), ("at most", 4, 4, True)]
    # A site that is eligible for its stream is so by another rule.
    effects[1] = effects[1]._replace(p_read=0.3)
    effects[3] = effects[3]._replace(p_read=0.3, p_stream=0.8)
    (first, *_) = by_patching(run, batch).rules
    assert (first.threshold, first.reached, first.passed) == (0.5, 0.8, True)
    assert "stream" in first.quantity


def by_patching(run: Run, batch: TaskBatch, site: int | None = None) -> Channel:
    return channel_by_patching(run, "quote_type", "single_double_quote", batch, site=site)


def test_rules_are_kept_in_the_file(run: Run) -> None:
    rules = (Rule(quantity="share", bound="at least", threshold=0.9, reached=0.8),)
    channel = Channel(name="kept", site=1, indices=(3,), weights=(1.0,), rules=rules)
    save_channel(run.folder, channel)
    assert load_channels(run.folder)["kept"] == channel
    # A search by an earlier version kept none.
    text = (run.folder / "channels.json").read_text()
    entries = json.loads(text)
    del entries["kept"]["rules"], entries["kept"]["digest"]
    (run.folder / "channels.json").write_text(json.dumps(entries))
    assert load_channels(run.folder)["kept"].rules == ()


def test_a_circuits_channel_carries_its_rules(run: Run, batch: TaskBatch) -> None:
    circuit = circuit_with(run, **reads(site0=[3, 4, 5, 6, 7], site3=[1, 30]))
    tokens, other, answers, last = flipped(batch)
    with torch.no_grad():
        exchanged = float((log_p(run.sparse(other), answers, last) - log_p(run.sparse(tokens), answers, last)).mean())
    channel = channel_by_circuit(run, "c", circuit, batch)
    effect = ReadPatch(run, batch, channel.site).effect(read_channels(circuit, 32)[channel.site])
    chosen, *share = channel.rules
    assert (chosen.threshold, chosen.reached) == pytest.approx((exchanged / 2, effect), abs=1e-5)
    assert [rule.threshold for rule in share] == [0.9, 4]
    assert len(channel_by_circuit(run, "c", circuit, batch, site=3).rules) == 2
