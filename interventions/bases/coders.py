"""TopK sparse autoencoders and a transcoder of a dense site, trained on the run's own text (arXiv 2406.04093).

The well-kept library for these, SAELens, asks for an older TransformerLens than this project's.

An autoencoder reconstructs what the next sublayer reads, before the norm's gain; a transcoder reads the same and gives
what the sublayer writes. Each keeps the `kept` largest latents of a token, negative ones at zero.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridges.losses import nmse
from bridges.run_folder import Run
from sparse_model.io.progress import progress_bar

_TOKENS = 4096  # of a step


class Coder(nn.Module):
    """latents = TopK(relu(encoder(x - centre))), y = scale * (latents @ columns + bias)."""

    scale: Float[Tensor, ""]
    """The RMS of what is to be given, as the first batch has it."""

    def __init__(self, d_in: int, d_out: int, latents: int, kept: int, generator: torch.Generator) -> None:
        super().__init__()
        if not 1 <= kept <= latents:
            raise ValueError(f"kept={kept}: an autoencoder of {latents} latents can keep 1 to {latents}")
        columns = torch.randn(latents, d_out, generator=generator)
        columns = columns / columns.norm(dim=1, keepdim=True)
        self.kept = kept
        self.columns = nn.Parameter(columns)
        self.encoder = nn.Linear(d_in, latents)
        nn.init.zeros_(self.encoder.bias)
        with torch.no_grad():
            drawn = columns if d_in == d_out else torch.randn(latents, d_in, generator=generator) / d_in**0.5
            self.encoder.weight.copy_(drawn)
        self.register_buffer("scale", torch.ones(()))
        self.centre, self.bias = nn.Parameter(torch.zeros(d_in)), nn.Parameter(torch.zeros(d_out))

    def latents(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token latent"]:
        """The latents of tokens, all but `kept` of each zero."""
        values, indices = self.encoder(x - self.centre).relu().topk(self.kept, dim=-1)
        return torch.zeros(*x.shape[:-1], len(self.columns), device=x.device).scatter(-1, indices, values)

    def forward(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token d_out"]:
        """What the coder makes of its input."""
        return self.scale * (self.latents(x) @ self.columns + self.bias)

    def directions(self) -> Float[Tensor, "latent d_out"]:
        """What one unit of each latent adds to the output."""
        return (self.scale * self.columns).detach()

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every column length 1, so that no latent shrinks by growing its column."""
        self.columns.div_(self.columns.norm(dim=1, keepdim=True).clamp(min=1e-30))


class Sample(NamedTuple):
    """What a site's next sublayer reads of tokens, each at mean square 1, and, where asked for, what it writes."""

    read: Float[Tensor, "token d_dense"]
    written: Float[Tensor, "token d_dense"] | None


class Trained(NamedTuple):
    """A coder, and how well it does on held-out text."""

    coder: Coder
    nmse: float
    unused: int
    """Latents that are zero at every held-out token."""


@torch.no_grad()
def sample_site(run: Run, site: int, blocks: Int[Tensor, "block pos"], *, writes: bool = False) -> Sample:
    """The reads, and the writes, of the dense sublayer that reads a site."""
    dense = run.dense
    stream = dense.embed(blocks.long().to(run.bridges.rms_sparse.device))
    for i in range(site):
        stream = dense.sublayer(i, stream)
    norm = dense.anatomy.read_norm(site)
    read = norm.centre(stream) / norm.scale(stream)
    written = (dense.sublayer(site, stream) - stream).flatten(0, 1).float() if writes else None
    return Sample(read.flatten(0, 1).float(), written)


def train_coders(
    run: Run,
    site: int,
    train: Int[Tensor, "train_block pos"],
    held_out: Int[Tensor, "block pos"],
    *,
    kept: tuple[int, ...],
    transcoder: bool,
    tokens: int,
    seed: int,
    progress: bool = False,
) -> dict[str, Trained]:
    """Autoencoders that keep `kept` latents, and a transcoder that keeps the most of them, as wide as the sparse model.

    All see the same tokens: blocks of training text in random order, again from the start where the text ends.
    """
    generator = torch.Generator().manual_seed(seed)
    width, d = run.sparse.d_model, run.dense.d_model
    device = run.bridges.rms_sparse.device
    coders = {f"TopK autoencoder, k {k}": Coder(d, d, width, k, generator).to(device) for k in kept}
    if transcoder:
        coders[f"transcoder, k {max(kept)}"] = Coder(d, d, width, max(kept), generator).to(device)
    steps = max(1, tokens // _TOKENS)
    full_rate = 2e-4 * (2**14 / width) ** 0.5  # what the paper of TopK autoencoders gives for a width
    optimizers = {name: torch.optim.Adam(coder.parameters(), eps=6.25e-10) for name, coder in coders.items()}
    batches = islice(_batches(train, generator), steps)
    for step, blocks in enumerate(progress_bar(batches, "autoencoders", steps, unit="step", disable=not progress)):
        sample = sample_site(run, site, blocks, writes=transcoder)
        if step == 0:
            _centre(coders, sample)
        rate = full_rate * min(1.0, 5 * (1 - step / steps))  # falls to zero over the last fifth
        for name, coder in coders.items():
            _step(coder, optimizers[name], sample, _target(name, sample), rate)
    sample = sample_site(run, site, held_out, writes=transcoder)
    return {name: _held_out(coder, sample, _target(name, sample)) for name, coder in coders.items()}


def _target(name: str, sample: Sample) -> Float[Tensor, "token d_dense"]:
    if name.startswith("transcoder"):
        assert sample.written is not None
        return sample.written
    return sample.read


@torch.no_grad()
def _centre(coders: dict[str, Coder], sample: Sample) -> None:
    for name, coder in coders.items():
        coder.centre.copy_(sample.read.mean(0))
        coder.scale.copy_(_target(name, sample).square().mean().sqrt().clamp(min=1e-30))
        coder.bias.copy_(_target(name, sample).mean(0) / coder.scale)


def _step(
    coder: Coder,
    optimizer: torch.optim.Optimizer,
    sample: Sample,
    target: Float[Tensor, "token d_dense"],
    rate: float,
) -> None:
    with torch.enable_grad():
        loss = nmse(coder(sample.read), target)
        optimizer.zero_grad()
        loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    coder.normalise()


@torch.no_grad()
def _held_out(coder: Coder, sample: Sample, target: Float[Tensor, "token d_dense"]) -> Trained:
    error = float(nmse(coder(sample.read), target))
    return Trained(coder.requires_grad_(False), error, int((coder.latents(sample.read) == 0).all(0).sum()))


def _batches(blocks: Int[Tensor, "block pos"], generator: torch.Generator) -> Iterator[Int[Tensor, "some pos"]]:
    size = max(1, _TOKENS // blocks.shape[1])
    while True:
        for rows in torch.randperm(len(blocks), generator=generator).split(size):
            yield blocks[rows]
