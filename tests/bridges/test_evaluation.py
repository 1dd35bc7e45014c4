"""The headline table: every column computed a second way, on random models and bridges, in uneven batches."""

import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import digests, make_tiny_run
from support.report_runs import TASK, circuit
from torch.distributions import Categorical, kl_divergence

from bridges.dense import DenseModel
from bridges.evaluation import (
    RANDOM_PATHS,
    Bridged,
    Moments,
    evaluate,
    evaluation_table,
    evaluation_verdict,
    random_paths_kl,
)
from bridges.hybrid import mixed_path, random_path, residuals, suffix
from bridges.pipeline import evaluate_run
from bridges.run_folder import Run, fingerprint, open_run
from bridges.scales import measure_scales, stream_scales
from bridges.sites import all_sites
from interventions.circuits.circuit import load_circuit
from sparse_model.config import SparsityConfig
from sparse_model.sparsity.projection import project_
from sparse_model.sparsity.sparse_linear import SparseLinear, sparse_products

N_SITES = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Random models in float64; a quarter of the sparse weights is left, and some reads are dead."""
    torch.manual_seed(0)
    run = make_tiny_run(tmp_path_factory.mktemp("runs") / "run")
    project_(run.sparse.sparse_parameters(0.25), SparsityConfig())
    with torch.no_grad():
        run.sparse.bigram.normal_()
        run.sparse.blocks[1].ln2.weight[:7] = 0
        run.dense.hf.transformer.wpe.weight.add_(0.5)  # a mean that is not zero: the three scales differ
        for linear in (*run.bridges.encoders, *run.bridges.decoders):
            linear.bias.normal_()
    return run._replace(dense=run.dense.double(), sparse=run.sparse.double(), bridges=run.bridges.double())


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    return torch.randint(384, (5, 11), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


@pytest.fixture(scope="module")
def metrics(run: Run, blocks: torch.Tensor) -> dict:
    return evaluate(run.dense, run.sparse, run.bridges, blocks, batch_size=2, progress=False)


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Token by token, from the definition."""
    found = [
        -math.log(row[pos].detach().softmax(-1)[ids[pos + 1]])
        for row, ids in zip(logits, tokens.tolist(), strict=True)
        for pos in range(len(ids) - 1)
    ]
    return sum(found) / len(found)


def kl_between(p: torch.Tensor, q: torch.Tensor) -> float:
    return kl_divergence(Categorical(logits=p), Categorical(logits=q)).mean().item()


def streams(run: Run, blocks: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    tokens = blocks.long()
    with torch.no_grad():
        return residuals(run.dense, tokens), residuals(run.sparse, tokens)


def test_the_models_own_losses(run: Run, blocks: torch.Tensor, metrics: dict) -> None:
    tokens = blocks.long()
    assert metrics["dense"]["ce"] == pytest.approx(cross_entropy(run.dense.hf(tokens).logits, tokens), rel=1e-6)
    assert metrics["sparse"]["ce"] == pytest.approx(cross_entropy(run.sparse(tokens), tokens), rel=1e-6)
    assert metrics["held_out_tokens"] == 5 * 11
    assert [(s["site"], s["label"]) for s in metrics["sites"]] == [
        (0, "attn.0"), (1, "mlp.0"), (2, "attn.1"), (3, "mlp.1"), (4, "unembed"),
    ]  # fmt: skip


def test_errors_of_the_bridges(run: Run, blocks: torch.Tensor, metrics: dict) -> None:
    for i, (dense, sparse) in enumerate(zip(*streams(run, blocks), strict=True)):
        with torch.no_grad():
            pairs = {"encode": (run.bridges.encode(i, dense), sparse), "decode": (run.bridges.decode(i, sparse), dense)}
        for way, pair in pairs.items():
            predicted, target = (x.flatten(0, 1).numpy() for x in pair)
            spread = target.var(0).sum()
            nmse = ((predicted - target) ** 2).mean(0).sum() / spread
            explained = 1 - (predicted - target).var(0).sum() / spread
            assert metrics["sites"][i][f"nmse_{way}"] == pytest.approx(nmse, rel=1e-9)
            assert metrics["sites"][i][f"explained_variance_{way}"] == pytest.approx(explained, rel=1e-9)
            assert abs(nmse - (1 - explained)) > 1e-3  # the biases count in one and not in the other
            assert abs(nmse / (((predicted - target) ** 2).sum() / (target**2).sum()) - 1) > 1e-3


def test_losses_of_the_hybrids_and_the_share_recovered(run: Run, blocks: torch.Tensor, metrics: dict) -> None:
    tokens = blocks.long()
    target = run.dense.hf(tokens).logits
    for i, (dense, sparse) in enumerate(zip(*streams(run, blocks), strict=True)):
        site = metrics["sites"][i]
        with torch.no_grad():
            ways = {
                "dense_to_sparse": (run.sparse, run.bridges.encode(i, dense), sparse),
                "sparse_to_dense": (run.dense, run.bridges.decode(i, sparse), dense),
            }
        for way, (model, crossed, stream) in ways.items():
            hybrid, own = suffix(model, i, crossed, tokens), suffix(model, i, stream, tokens)
            mean = stream.mean((0, 1)).expand_as(stream)
            ce, whole = cross_entropy(hybrid, tokens), cross_entropy(own, tokens)
            ablated = cross_entropy(suffix(model, i, mean, tokens), tokens)
            zeroed = cross_entropy(suffix(model, i, torch.zeros_like(stream), tokens), tokens)
            assert site[f"ce_{way}"] == pytest.approx(ce, rel=1e-6)
            assert site[f"kl_{way}"] == pytest.approx(kl_between(target, hybrid), rel=1e-6)
            assert abs(kl_between(target, hybrid) / kl_between(hybrid, target) - 1) > 1e-3
            assert site[f"recovered_{way}"] == pytest.approx((ablated - ce) / (ablated - whole), rel=1e-4)
            assert abs(zeroed - ablated) > 1e-3 * abs(ablated - ce)


def test_a_bridge_that_carries_nothing_recovers_nothing(run: Run, blocks: torch.Tensor) -> None:
    """Decoders that give the mean of the dense stream carry nothing, whatever the sparse model is."""
    bridges = copy.deepcopy(run.bridges)
    for i, stream in enumerate(streams(run, blocks)[0]):
        torch.nn.init.zeros_(bridges.decoders[i].weight)
        bridges.decoders[i].bias.data = stream.mean((0, 1))
    sites = evaluate(run.dense, run.sparse, bridges, blocks, batch_size=2, progress=False)["sites"]
    assert [site["recovered_sparse_to_dense"] for site in sites] == pytest.approx([0.0] * N_SITES, abs=1e-4)
    assert [site["nmse_decode"] for site in sites] == pytest.approx([1.0] * N_SITES)


def test_sparsity_and_activations(run: Run, blocks: torch.Tensor, metrics: dict) -> None:
    found = metrics["sparse"]
    matrices = {p.name: p.tensor for p in run.sparse.sparse_parameters(1.0)}
    assert found["matrices"].keys() == matrices.keys()
    nonzeros = {name: int(np.count_nonzero(w.detach().numpy())) for name, w in matrices.items()}
    for name, w in matrices.items():
        assert found["matrices"][name] == {"nonzeros": nonzeros[name], "fraction": nonzeros[name] / w.numel()}
    assert found["nonzeros"] == sum(nonzeros.values())
    assert found["nonzero_fraction"] == pytest.approx(
        sum(nonzeros.values()) / sum(w.numel() for w in matrices.values())
    )
    _, cache = run.sparse.run_with_cache(blocks.long())
    for layer in (0, 1):
        for part in ("attn.hook_in", "attn.hook_q", "attn.hook_k", "attn.hook_v", "hook_attn_out", "mlp.hook_in",
                     "mlp.hook_post", "hook_mlp_out"):  # fmt: skip
            assert f"blocks.{layer}.{part}" in found["activation_l0"]
    assert len(found["activation_l0"]) == 17
    for name, l0 in found["activation_l0"].items():
        values = cache[name].detach().reshape(55, -1).numpy()
        assert l0 == pytest.approx(np.count_nonzero(values) / 55)
        assert found["dead_channels"][name] == int((values == 0).all(0).sum())
    for site, where in zip(metrics["sites"], all_sites(2), strict=True):
        assert site["dead_reads"] == found["dead_channels"][where.read_hook]
    assert metrics["sites"][3]["dead_reads"] >= 7


def test_random_mixed_paths(run: Run, blocks: torch.Tensor) -> None:
    """Each on one batch in turn, against the dense model's own logits."""
    rng, batches = np.random.default_rng(0), list(blocks.long().split(2))
    found = []
    for i in range(7):
        tokens, path = batches[i % 3], random_path(N_SITES, rng)
        with torch.no_grad():
            logits = mixed_path(run.dense, run.sparse, run.bridges, tokens, path)
        found.append(kl_between(run.dense.hf(tokens).logits, logits))
    models = Bridged(run.dense, run.sparse, run.bridges)
    assert random_paths_kl(models, batches, n=7) == pytest.approx(sum(found) / 7, rel=1e-6)


def test_the_paths_of_the_table_are_all_of_them(metrics: dict) -> None:
    assert metrics["paths"]["n"] == RANDOM_PATHS == 64
    assert metrics["paths"]["kl"] > 0.01


def test_stream_scales_by_hand() -> None:
    """Means over tokens of each token's own root mean square and deviation, not of the whole."""
    dense = torch.tensor([[[3.0, 1.0], [1.0, 1.0]]])  # rms sqrt(5) and 1; deviations from 2 and 1: 1 and 0
    sparse = torch.tensor([[[2.0, 0.0, 0.0, 0.0], [4.0, 4.0, 4.0, 4.0]]])  # rms 1 and 4
    found = stream_scales(dense, sparse)
    assert [float(value) for value in found] == pytest.approx([(math.sqrt(5) + 1) / 2, 0.5, 2.5])


def test_scales_are_means_over_tokens_and_evaluation_leaves_them_alone(run: Run, blocks: torch.Tensor) -> None:
    measure_scales(run.dense, run.sparse, run.bridges, blocks, batch_size=2)
    dense, sparse = ([h.flatten(0, 1).numpy() for h in side] for side in streams(run, blocks))
    rms = [[np.sqrt((h**2).mean(-1)).mean() for h in side] for side in (dense, sparse)]
    assert run.bridges.rms_dense.tolist() == pytest.approx(rms[0], rel=1e-6)
    assert run.bridges.std_dense.tolist() == pytest.approx([h.std(-1).mean() for h in dense], rel=1e-6)
    assert run.bridges.rms_sparse.tolist() == pytest.approx(rms[1], rel=1e-6)
    before = {name: t.clone() for name, t in run.bridges.state_dict().items()}
    evaluate(run.dense, run.sparse, run.bridges, blocks[:2], progress=False)
    for name, t in run.bridges.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_a_run_that_is_evaluated_on_other_text_keeps_its_circuits_and_its_files(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path / "run")
    found = circuit(run)
    files = digests(run.folder)
    evaluate_run(run, tokens=80, blocks=torch.randint(384, (4, 20)), progress=False)
    assert {name for name, value in digests(run.folder).items() if value != files.get(name)} == {"metrics.json"}
    again = open_run(run.folder)
    assert load_circuit(again, TASK).fingerprint == found.fingerprint == fingerprint(again) == fingerprint(run)
    again.bridges.set_scales(*3 * [torch.full((N_SITES,), 2.0)])
    assert fingerprint(again) == found.fingerprint
    with torch.no_grad():
        again.bridges.decoders[0].bias[0] += 1
    assert fingerprint(again) != found.fingerprint


def test_moments_by_hand() -> None:
    target = torch.tensor([[[0.0, 2.0]], [[4.0, 2.0]]])  # mean (2, 2), squares about it 4 + 4
    prediction = torch.tensor([[[1.0, 2.0]], [[5.0, 4.0]]])  # errors (1, 0) and (1, 2): 6; about their mean (1, 1): 2
    moments = Moments()
    moments.add(prediction, target)
    assert moments.nmse() == pytest.approx(6 / 8)
    assert moments.explained_variance() == pytest.approx(1 - 2 / 8)
    assert moments.mean().tolist() == [2, 2]


def test_the_table_prints_every_column_and_their_means(metrics: dict) -> None:
    lines = evaluation_table(metrics).splitlines()
    keys = ["nmse_encode", "nmse_decode", "explained_variance_encode", "explained_variance_decode",
            "kl_dense_to_sparse", "kl_sparse_to_dense", "ce_dense_to_sparse", "ce_sparse_to_dense",
            "recovered_dense_to_sparse", "recovered_sparse_to_dense"]  # fmt: skip
    assert lines[0].split() == ["site", "reader", "NMSE", "EV", "KL", "CE", "kept", "dead"]
    assert lines[1].split() == ["d>s", "s>d"] * 5
    for line, site in zip(lines[2:7], metrics["sites"], strict=True):
        numbers = [f"{site[key]:.3f}" for key in keys]
        assert line.split() == [str(site["site"]), site["label"], *numbers, str(site["dead_reads"])]
    means = [f"{np.mean([site[key] for site in metrics['sites']]):.3f}" for key in keys]
    assert lines[7].split() == ["mean", *means]
    sparse = metrics["sparse"]
    dead = sum(n for name, n in sparse["dead_channels"].items() if name.endswith("mlp.hook_post"))
    words = " ".join(lines[8:])
    assert words.startswith(
        f"dense CE {metrics['dense']['ce']:.4f}, sparse CE {sparse['ce']:.4f} on 55 held-out tokens; "
        f"{sparse['nonzeros']} nonzero weights, 1 in {sparse['nonzero_fraction'] ** -1:.1f}; {dead} dead neurons; "
        f"KL of 64 random mixed paths {metrics['paths']['kl']:.3f} d>s: from the dense model"
    )
    assert max(map(len, lines)) <= 100
    for group in ("NMSE:", "EV:", "KL, CE:", "kept:", "dead:"):
        assert group in words


def test_the_verdict_names_the_sites_that_keep_too_little(metrics: dict) -> None:
    fine = [site | {"recovered_dense_to_sparse": 0.8, "recovered_sparse_to_dense": 1.0} for site in metrics["sites"]]
    assert evaluation_verdict(metrics | {"sites": fine}).startswith("good: at every site at least 0.8")
    fine[1]["recovered_sparse_to_dense"] = 0.79
    fine[2]["recovered_dense_to_sparse"] = float("nan")
    verdict = evaluation_verdict(metrics | {"sites": fine})
    assert verdict.startswith("weak: less than 0.8 of the loss is kept at mlp.0 s>d (0.79), attn.1 d>s (nan); more")


def test_the_target_of_a_batch_is_made_once_for_all_paths(
    run: Run, blocks: torch.Tensor, metrics: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a large vocabulary the logits are what takes the time."""
    made, unembed = [], DenseModel.unembed

    def count(self: DenseModel, *args: torch.Tensor) -> torch.Tensor:
        made.append(self)
        return unembed(self, *args)

    monkeypatch.setattr(DenseModel, "unembed", count)
    batches = list(blocks.long().split(2))
    found = random_paths_kl(Bridged(run.dense, run.sparse, run.bridges), batches)
    assert found == pytest.approx(metrics["paths"]["kl"], rel=1e-12)
    rng = np.random.default_rng(0)
    ends = [random_path(N_SITES, rng)[-1] for _ in range(RANDOM_PATHS)]
    assert len(made) == len(batches) + ends.count("dense")


def test_zeros_are_skipped_while_a_run_is_evaluated(
    run: Run, blocks: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridges.evaluation.sparse_products", partial(sparse_products, most=1.0, least=1))
    products, multiply = [], SparseLinear.forward

    def look(self: SparseLinear, given: torch.Tensor) -> torch.Tensor:
        products.append(self.packed is not None)
        return multiply(self, given)

    monkeypatch.setattr(SparseLinear, "forward", look)
    evaluate(run.dense, run.sparse, run.bridges, blocks[:2], progress=False)
    assert len(products) > 100
    assert all(products)
    assert run.sparse.unembedding.packed is None
