"""The units of an intervention, against a second implementation: plain torch on the weights alone."""

import json
from pathlib import Path

import pytest
import torch
from support.reference import naive_run
from torch.nn.functional import gelu, layer_norm

from bridges.hybrid import residuals, suffix
from bridges.run_folder import Run
from interventions import Intervention, intervene, load_dense, load_hf
from interventions.bundle.bundle import get_bundle
from interventions.editing.vectors import encoded_value

SITE, INDICES, WEIGHTS = 2, [3, 11], torch.tensor([1.0, -0.5])  # the channel "pair"
UNITS = ["exact", "paper"]


def rms(x: torch.Tensor) -> torch.Tensor:
    return (x**2).mean(-1, keepdim=True) ** 0.5


class Plain:
    """A two-layer GPT-2 and its bridges, written out; `steered` edits what is read at site 2, or the stream there."""

    def __init__(self, run: Run) -> None:
        self.w = {name: t.detach() for name, t in run.dense.hf.transformer.state_dict().items()}
        self.head = run.dense.hf.lm_head.weight.detach()
        self.run, self.bridges = run, {name: t.detach() for name, t in run.bridges.state_dict().items()}

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)

    def attention(self, layer: int, read: torch.Tensor) -> torch.Tensor:
        batch, length, width = read.shape
        q, k, v = (
            part.view(batch, length, 2, width // 2).transpose(1, 2)
            for part in self.linear(f"h.{layer}.attn.c_attn", read).split(width, -1)
        )
        scores = q @ k.mT / (width // 2) ** 0.5
        scores = scores + torch.full((length, length), -torch.inf).triu(1)
        return self.linear(f"h.{layer}.attn.c_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        inner = self.linear(f"h.{layer}.mlp.c_fc", self.norm(f"h.{layer}.ln_2", x))
        return self.linear(f"h.{layer}.mlp.c_proj", gelu(inner, approximate="tanh"))

    def steered(self, tokens: torch.Tensor, where: str, units: str, options: dict) -> torch.Tensor:
        x = self.w["wte.weight"][tokens] + self.w["wpe.weight"][: tokens.shape[1]]
        x = x + self.attention(0, self.norm("h.0.ln_1", x))
        x = x + self.mlp(0, x)
        v = self.change(tokens, x, units, options)
        read = self.norm("h.1.ln_1", x)
        if where == "stream":
            x = x + v
            read = self.norm("h.1.ln_1", x)
        else:
            std = (x.var(-1, correction=0, keepdim=True) + 1e-5) ** 0.5
            if units == "paper":
                std = self.bridges["std_dense"][SITE]
            read = read + self.w["h.1.ln_1.weight"] * (v - v.mean(-1, keepdim=True)) / std
        x = x + self.attention(1, read)
        x = x + self.mlp(1, x)
        return self.norm("ln_f", x) @ self.head.T

    def change(self, tokens: torch.Tensor, x: torch.Tensor, units: str, options: dict) -> torch.Tensor:
        """How far the dense stream moves."""
        columns = self.bridges[f"decoders.{SITE}.weight"][:, INDICES].T
        encoded = x @ self.bridges[f"encoders.{SITE}.weight"].T + self.bridges[f"encoders.{SITE}.bias"]
        kept = encoded.abs() >= encoded.abs().sort(-1, descending=True).values[..., 7:8]  # 8 of 32
        encoded = encoded * kept
        scale = rms(encoded)
        if "delta" in options:
            moved = options["delta"] * WEIGHTS
        elif "set_to" in options:
            now = ((encoded / scale)[..., INDICES] * WEIGHTS).sum(-1, keepdim=True) / 1.25
            moved = (options["set_to"] - now) * WEIGHTS
        else:
            (there, _), (here, scale) = self.sparse_read(options["toward"]), self.sparse_read(tokens)
            moved = options["strength"] * (there - here)
        if units == "paper":
            scale = self.bridges["rms_sparse"][SITE]
        return scale * moved @ columns

    def sparse_read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [naive_run(self.run.sparse, row)[1] for row in tokens.tolist()]
        streams, reads = (
            torch.tensor([row[name].tolist() for row in rows])
            for name in ("blocks.1.hook_resid_pre", "blocks.1.attn.hook_in")
        )
        return reads[..., INDICES], rms(streams)


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("where", ["read", "stream"])
def test_a_second_implementation_agrees(dense, folder: Path, run: Run, tokens, where: str, units: str) -> None:
    """TransformerLens and Hugging Face; in one pass, and token by token behind a KV cache."""
    plain, hf = Plain(run), load_hf(folder)
    unsteered = dense(tokens)
    for options in ({"delta": -3}, {"set_to": 1.5}, {"toward": tokens.flip(1), "strength": 2}):
        expected = plain.steered(tokens, where, units, options)
        assert (expected - unsteered).abs().max() > 1e-3
        with intervene(dense, "pair", where=where, units=units, **options):
            torch.testing.assert_close(dense(tokens), expected, rtol=1e-4, atol=1e-5)
        with intervene(hf, "pair", where=where, units=units, **options):
            torch.testing.assert_close(hf(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        if "toward" in options:  # aligned with a prompt that is seen at once
            continue
        with intervene(hf, "pair", where=where, units=units, **options):
            first = hf(tokens[:, :5], use_cache=True)
            parts = [first.logits]
            for at in range(5, tokens.shape[1]):
                parts.append(hf(tokens[:, at : at + 1], past_key_values=first.past_key_values).logits)
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_all_channels_at_strength_1_are_the_decoders_image_of_the_counterfactual_read(dense, run: Run, tokens) -> None:
    other = tokens.flip(1)
    names = [f"attn.1.read.{c}" for c in range(run.sparse.d_model)]
    here, scale = (f(residuals(run.sparse, tokens)[SITE]) for f in (lambda s: s, rms))
    reads = []
    for ids in (tokens, other):
        _, cache = run.sparse.run_with_cache(ids)
        reads.append(cache["blocks.1.attn.hook_in"])
    assert reads[0].shape == here.shape
    # The presented read is taken out of the sparse stream and the counterfactual one put in, at the token's own scale.
    image = run.bridges.decode(SITE, scale * reads[1]) - run.bridges.decode(SITE, scale * reads[0])
    dense_stream = residuals(run.dense, tokens)[SITE]
    with intervene(dense, names, toward=other, where="stream"):
        _, cache = dense.run_with_cache(tokens)
    torch.testing.assert_close(cache["blocks.1.hook_resid_pre"], dense_stream + image, rtol=0, atol=1e-5)
    assert image.abs().max() > 0.1


@torch.no_grad()
def test_set_to_gives_the_value_that_is_read(tmp_path: Path) -> None:
    """Through identity bridges the dense read itself shows it: in the units of its RMS, without the norm's gain."""
    from support.helpers import make_tiny_run

    dense = load_dense(make_tiny_run(tmp_path / "run", d_dense=16, d_sparse=16).folder)
    bridges = get_bundle(dense).bridges
    bridges.encoder_k = 16
    for part in (bridges.encoders[2], bridges.decoders[2]):
        part.weight.copy_(torch.eye(16))
    channel = load_channel(dense, "attn.1.read.7")
    tokens = torch.randint(384, (2, 9))
    stream = residuals(get_bundle(dense).run.dense, tokens)[2]
    value, scale = encoded_value(bridges, channel, stream)
    torch.testing.assert_close(value, stream[..., 7] / rms(stream)[..., 0])
    for options, expected in (({"set_to": 1.5}, torch.full_like(value, 1.5)), ({"delta": 0.5}, value + 0.5)):
        with intervene(dense, channel, where="stream", **options):
            _, cache = dense.run_with_cache(tokens)
        torch.testing.assert_close(cache["blocks.1.hook_resid_pre"][..., 7] / scale[..., 0], expected)


def load_channel(dense, address: str):
    from interventions.bundle.channels import resolve

    return resolve(address, {}, get_bundle(dense).shape)


def test_the_units_differ_where_the_stream_is_not_of_mean_length(dense, run: Run, tokens) -> None:
    stream = residuals(run.dense, tokens)[SITE]
    ratio = rms(run.bridges.encode(SITE, stream)) / run.bridges.rms_sparse[SITE]
    moved = {}
    for units in UNITS:
        with intervene(dense, "pair", delta=2.0, where="stream", units=units):
            _, cache = dense.run_with_cache(tokens)
        moved[units] = cache["blocks.1.hook_resid_pre"] - stream
    torch.testing.assert_close(moved["exact"], ratio * moved["paper"], rtol=1e-3, atol=1e-5)
    assert (ratio - 1).abs().max() > 0.05


def test_saved_handles_keep_their_units_and_those_without_are_refused(dense, tmp_path: Path, tokens) -> None:
    path = tmp_path / "handle"
    with intervene(dense, "pair", delta=2.0, units="paper") as handle:
        expected = dense(tokens)
    handle.save(path)
    with Intervention.load(path, dense):
        assert torch.equal(dense(tokens), expected)
    settings = json.loads((path / "intervention.json").read_text())
    assert settings["edits"][0].pop("units") == "paper"
    del settings["sha256"]
    (path / "intervention.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"handle is of an earlier version.*build the intervention again"):
        Intervention.load(path, dense)


def test_the_exact_edit_is_what_the_suffix_makes_of_it(dense, run: Run, tokens) -> None:
    stream = residuals(run.dense, tokens)[SITE]
    columns = run.bridges.decoders[SITE].weight
    change = rms(run.bridges.encode(SITE, stream)) * (columns[:, 3] - 0.5 * columns[:, 11])
    with intervene(dense, "pair", delta=-3, where="stream"):
        measured = dense(tokens)
    torch.testing.assert_close(measured, suffix(run.dense, SITE, stream - 3 * change, tokens), rtol=1e-4, atol=1e-5)
