"""Predict from the sparse model alone what moving its channels does to the dense model's logits; then measure it.

1. Of every site channels are drawn at random, of those that the sparse model reads in one of a hundred tokens of
   training text. No task and no label is looked at.
2. On held-out text each channel is moved by the same amount in the sparse model: in what the next sublayer reads at the
   last token, or at every token, or in the residual stream at the last. What that does to the sparse model's logits
   behind the last token is the prediction. It is written to OUT/prediction.safetensors, and its digest to
   OUT/prediction.json, before the dense model is run.
3. intervene() moves the same channels by the same amount in the dense model, through the decoder. OUT/figures.json and
   OUT/prediction.png compare the two.
4. Null: decoders whose columns are permuted among the channels of a site. A channel's edit then is another's, at every
   token, so what those decoders do is known from what is measured.
5. Beside it, sets of 1 to all channels drawn at random and moved together, at the last token, to their values on
   another text that ends in the same token.

Examples:
    python scripts/studies/prediction.py --run demo
    python scripts/studies/prediction.py --run runs/stdlib --channels 300 --out runs/stdlib-prediction
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Bool, Int
from prediction_figures import EDITS, PRIMARY, SETS, Changes, compare, compare_sets, draw, markdown
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridges.hybrid import advance, residuals
from bridges.packaged import find_run
from bridges.run_folder import Run, open_run
from bridges.sites import Site, all_sites
from interventions import Channel, intervene, load_dense
from interventions.bundle.channels import read_gain, residual_reads, stream_rms
from interventions.cli.options import report_errors
from interventions.report.texts import blocks, held_out
from sparse_model.config import require
from sparse_model.data.corpus import iter_documents
from sparse_model.data.encoding import encode_text
from sparse_model.data.prepare import corpus_config
from sparse_model.io.atomic import check_writable, replace_file, write_text
from sparse_model.io.progress import progress_bar

_ALIVE = 0.01
_CHANNELS_AT_ONCE = 16
_SIZES = (1, 4, 16, 64)
_SETS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Predict from the sparse model alone what moving its channels does to the dense model; then measure it."""

    run: str = "demo"
    """Run folder, or the name of a packaged bundle."""
    out: str | None = None
    """Folder of prediction, figures and picture; unset: runs/prediction-NAME."""
    channels: int = 400
    """How many channels, over all sites."""
    rows: int = 16
    """Pieces of held-out text; each channel is moved in all of them."""
    delta: float = 1.0
    """How far each channel is moved: in units of its read, whose scale is the sparse stream's RMS."""
    draws: int = 1000
    """Shuffled decoders."""
    seed: int = 0
    """Draws channels, text and shuffled decoders."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is edited where. The sparse model and the dense model are told the same."""

    tokens: Int[Tensor, "row pos"]
    following: Int[Tensor, " row"]
    """The text's own next token behind each row."""
    site: Int[Tensor, " channel"]
    channel: Int[Tensor, " channel"]
    delta: Tensor
    set_site: Int[Tensor, " set"]
    members: Bool[Tensor, "set d_sparse"]
    """Channels that are moved together; to their values on the row that stands beside: 0 and 1, 2 and 3, ..."""

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name).contiguous() for field in fields(self)}


def make_plan(run: Run, options: Options) -> Plan:
    """Channels and text, chosen without the dense model."""
    generator = torch.Generator().manual_seed(options.seed)
    tokens, following = _text(run, options.rows, generator)
    train, places = _training_text(run), all_sites(run.sparse.n_layers)
    sites, channels, set_sites, members = [], [], [], []
    for site in places:
        with torch.no_grad():
            reads = torch.cat([residual_reads(run.sparse, part, site.index) for part in train.split(32)])
        alive = ((reads != 0).float().mean((0, 1)) >= _ALIVE).nonzero().flatten()
        drawn = alive[torch.randperm(len(alive), generator=generator)[: -(-options.channels // len(places))]]
        sites.append(torch.full_like(drawn, site.index))
        channels.append(drawn.sort().values)
        for size in (*(size for size in _SIZES if size < run.sparse.d_model), run.sparse.d_model):
            for number in range(_SETS):
                chosen = torch.randperm(run.sparse.d_model, generator=generator)[:size]
                if number and size == run.sparse.d_model:
                    continue  # there is one set of all
                members.append(torch.zeros(run.sparse.d_model, dtype=torch.bool).index_fill(0, chosen, True))
                set_sites.append(site.index)
    return Plan(
        tokens=tokens,
        following=following,
        site=torch.cat(sites),
        channel=torch.cat(channels),
        delta=torch.tensor(options.delta),
        set_site=torch.tensor(set_sites),
        members=torch.stack(members),
    )


def _text(run: Run, rows: int, generator: torch.Generator) -> tuple[Int[Tensor, "row pos"], Int[Tensor, " row"]]:
    """The first three quarters of blocks of held-out text, and the token behind; two and two end in the same token.

    None of the two tokens ends a document.
    """
    n_ctx, end_of_text = run.config.sparse.n_ctx, run.tokenizer.eos_token_id
    documents = held_out(run, 32 * rows * n_ctx)
    require(documents.kind == "held-out", "run", run.folder, "its corpus cannot be read any more: put it back")
    text = blocks(documents, n_ctx)
    length = 3 * n_ctx // 4
    text = text[(text[:, length - 1] != end_of_text) & (text[:, length] != end_of_text)]
    text = text[torch.randperm(len(text), generator=generator)]
    alone: dict[int, int] = {}
    taken: list[int] = []
    for row, token in enumerate(text[:, length - 1].tolist()):
        other = alone.pop(token, None)
        if other is None:
            alone[token] = row
        elif len(taken) < rows:
            taken += [other, row]
    require(
        len(taken) == rows, "rows", rows, f"the held-out text gives {len(taken)}: ask for an even number up to that"
    )
    return text[taken, :length].contiguous(), text[taken, length].clone()


def _training_text(run: Run, most: int = 8192) -> Int[Tensor, "row pos"]:
    ids: list[int] = []
    for document in iter_documents(corpus_config(run.config, run.samples), "train"):
        special = run.config.special_tokens
        ids += [run.tokenizer.eos_token_id, *encode_text(run.tokenizer, document[: 8 * most], special_tokens=special)]
        if len(ids) >= most:
            break
    n_ctx = min(run.config.sparse.n_ctx, len(ids))
    return torch.tensor(ids[: len(ids) // n_ctx * n_ctx]).view(-1, n_ctx)


@torch.no_grad()
def predict(run: Run, plan: Plan) -> dict[str, Changes]:
    """The change of the sparse model's logits behind the last token, by edit; the dense model has no part in it."""
    found: dict[str, list[Tensor]] = {edit: [] for edit in (*EDITS, *SETS)}
    streams = residuals(run.sparse, plan.tokens)
    base = run.sparse.unembed(streams[-1], plan.tokens)[:, -1]
    beside = _beside(len(plan.tokens))
    for site in all_sites(run.sparse.n_layers):
        stream, width = streams[site.index], run.sparse.d_model
        reads = residual_reads(run.sparse, plan.tokens, site.index)[:, -1]
        for part in plan.channel[plan.site == site.index].split(_CHANNELS_AT_ONCE):
            amount = plan.delta * torch.nn.functional.one_hot(part, width)[:, None, None]
            for edit in EDITS:
                change = torch.zeros(len(part), *stream.shape)
                change[:, :, slice(None) if edit == "all" else slice(-1, None)] = amount
                found[edit].append(_changed(run, plan, site, change, stream, edit == "stream") - base)
        for members in plan.members[plan.set_site == site.index]:
            change = torch.zeros(1, *stream.shape)
            change[0, :, -1] = members * (reads[beside] - reads)
            for edit in SETS:
                found[edit].append(_changed(run, plan, site, change, stream, edit == "sets_stream") - base)
    return {edit: _centred(torch.cat(parts)) for edit, parts in found.items()}


def _beside(rows: int) -> Int[Tensor, " row"]:
    return torch.arange(rows) ^ 1


def _changed(run: Run, plan: Plan, site: Site, change: Tensor, stream: Tensor, in_stream: bool) -> Changes:
    """The sparse model's logits behind the last token where its read at a site is changed by [edit, row, pos, d]."""
    edits, width, gain = len(change), run.sparse.d_model, read_gain(run.sparse, site.index)
    start, moves = stream.repeat(edits, 1, 1), change.flatten(0, 1)
    if in_stream:
        start, moves = start + stream_rms(start) * moves, torch.zeros_like(moves)

    def move(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()  # behind the channels may stand positions
        value[..., :width] += gain * moves
        return value

    with run.sparse.hooks(fwd_hooks=[(site.read_hook, move)]):
        end = advance(run.sparse, site.index, start)
        logits = run.sparse.unembed(end, plan.tokens.repeat(edits, 1))[:, -1]
    return logits.unflatten(0, (edits, -1))


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


@torch.no_grad()
def measure(dense: Any, plan: Plan) -> dict[str, Changes]:
    """The change of the dense model's logits under the same edits, through `intervene`."""
    labels = {site.index: site.label for site in all_sites(dense.bundle.run.dense.n_layers)}
    last = torch.zeros(plan.tokens.shape, dtype=torch.bool)
    last[:, -1] = True
    base = dense(plan.tokens)[:, -1]
    found: dict[str, list[Tensor]] = {edit: [] for edit in (*EDITS, *SETS)}
    pairs = list(zip(plan.site.tolist(), plan.channel.tolist(), strict=True))
    for site, channel in progress_bar(pairs, desc="measured", unit="channel"):
        for edit in EDITS:
            positions, where = None if edit == "all" else last, "stream" if edit == "stream" else "read"
            name = f"{labels[site]}.read.{channel}"
            with intervene(dense, name, delta=float(plan.delta), positions=positions, where=where):
                found[edit].append(dense(plan.tokens)[:, -1] - base)
    other = plan.tokens[_beside(len(plan.tokens))]
    for site, members in zip(plan.set_site.tolist(), plan.members, strict=True):
        indices = tuple(members.nonzero().flatten().tolist())
        channel = Channel(name="set", site=site, indices=indices, weights=(1.0,) * len(indices))
        for edit in SETS:
            where = "stream" if edit == "sets_stream" else "read"
            with intervene(dense, channel, toward=other, positions=last, where=where):
                found[edit].append(dense(plan.tokens)[:, -1] - base)
    return {edit: _centred(torch.stack(parts)) for edit, parts in found.items()}


def register(out: Path, run: Run, plan: Plan, options: Options) -> str:
    """Write the prediction, and then its digest; returns the digest."""
    tensors = {f"change_{edit}": change.contiguous() for edit, change in predict(run, plan).items()}
    with replace_file(out / "prediction.safetensors") as temporary:
        save_file(tensors | plan.tensors(), temporary)
    record = {
        "sha256": _digest_of(out),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "options": asdict(options),
        "primary": PRIMARY,
        "channels": len(plan.channel),
    }
    write_text(out / "prediction.json", json.dumps(record, indent=1) + "\n")
    return record["sha256"]


def _digest_of(out: Path) -> str:
    return hashlib.sha256((out / "prediction.safetensors").read_bytes()).hexdigest()


def read_prediction(out: Path) -> dict[str, Tensor]:
    """What was predicted, as it was registered. Raises ValueError where it has changed since."""
    if _digest_of(out) != json.loads((out / "prediction.json").read_text())["sha256"]:
        raise ValueError(f"{out / 'prediction.safetensors'} is not what was registered: predict again")
    return load_file(out / "prediction.safetensors")


def figures_of(plan: Plan, predicted: dict[str, Tensor], measured: dict[str, Changes], options: Options) -> dict:
    """All figures."""
    figures: dict[str, Any] = {"options": asdict(options)}
    for edit in EDITS:
        change = predicted[f"change_{edit}"], measured[edit]
        figures[edit] = compare(plan.site, plan.following, *change, options.draws, options.seed)
    size = plan.members.sum(1)
    sets = {edit: compare_sets(size, plan.set_site, predicted[f"change_{edit}"], measured[edit]) for edit in SETS}
    return figures | sets


def main(options: Options) -> None:
    require(options.channels > 0, "channels", options.channels, "use at least 1; a claim needs hundreds")
    require(options.rows > 1, "rows", options.rows, "use at least 2: sets take their values from another")
    require(options.draws > 0, "draws", options.draws, "use at least 1")
    folder = find_run(options.run)
    out = Path(options.out or f"runs/prediction-{folder.name}")
    check_writable(out)
    run = open_run(folder)
    run.bridges.check_scales()
    plan = make_plan(run, options)
    out.mkdir(parents=True, exist_ok=True)
    digest = register(out, run, plan, options)
    print(f"predicted: {len(plan.channel)} channels in {len(plan.tokens)} texts, sha256 {digest}; now the dense model")
    measured = measure(load_dense(options.run), plan)
    predicted = read_prediction(out)
    figures = figures_of(plan, predicted, measured, options) | {"prediction": digest}
    write_text(out / "figures.json", json.dumps(figures, indent=1) + "\n")
    edit = PRIMARY[0]
    change = predicted[f"change_{edit}"], measured[edit]
    picture = draw(out / "prediction.png", plan.site, *change, figures, options.seed)
    print(markdown(figures, run.sparse.n_layers))
    print(f"written: {out / 'figures.json'}, {picture}")


if __name__ == "__main__":
    with report_errors():
        main(tyro.cli(Options))
