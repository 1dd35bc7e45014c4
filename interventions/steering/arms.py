"""The second stage of a steering experiment: the edits that are compared, made from its setting.

One of each kind: the sets of channels, the same through a ridge regression, the difference of means, the exact patch.
Drawn at random, as long as the reference set's edit: directions, channels, shuffled decoders, untrained bridges.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.steering.edits import Columns, channel_edit, mean_norm, scaled, sparse_changes
from interventions.steering.ridge import Ridge, fit_ridge, ridge_report, stream_at
from interventions.steering.rivals import (
    along,
    difference_of_means,
    exact_patch,
    random_channels,
    random_directions,
    shuffled_columns,
    untrained_columns,
)
from interventions.steering.setting import Setting
from interventions.steering.steered_prompts import Vectors


@dataclass(frozen=True, kw_only=True)
class Edits:
    """The edits of which there is one each, at strength 1."""

    sets: dict[str, Vectors]
    """By number of channels."""
    ridge: dict[str, Vectors]
    """The same channels through a ridge regression."""
    paper: dict[str, Vectors]
    """The same channels in the paper's units."""
    by_patching: dict[str, Vectors]
    """The sets that the sparse model alone names, by their number."""
    difference_of_means: Vectors
    exact_patch: Vectors
    ridge_fit: dict[str, float]
    """How well the regression predicts the dense stream on held-out text, beside the trained decoder."""

    def named(self) -> dict[str, Vectors]:
        """All of them by name."""
        return {
            **self.sets,
            **{f"ridge {name}": edit for name, edit in self.ridge.items()},
            **{f"paper {name}": edit for name, edit in self.paper.items()},
            **{f"by_patching {name}": edit for name, edit in self.by_patching.items()},
            "difference_of_means": self.difference_of_means,
            "exact_patch": self.exact_patch,
        }


@torch.no_grad()
def make_edits(setting: Setting) -> Edits:
    """The edits of an experiment's channels, and their rivals of which there is one each."""
    run, site, prompts = setting.run, setting.site, setting.prompts
    ridge = _ridge(setting)
    decoder, changes = run.bridges.directions(site), sparse_changes(run, site, prompts)
    in_paper_units = sparse_changes(run, site, prompts, "paper", setting.plan.where)
    return Edits(
        sets={n: channel_edit(changes, decoder, c) for n, c in setting.sets.items()},
        ridge={n: channel_edit(changes, ridge.columns, c) for n, c in setting.sets.items()},
        paper={n: channel_edit(in_paper_units, decoder, c) for n, c in setting.sets.items()},
        by_patching={n: channel_edit(changes, decoder, c) for n, c in setting.patching_sets.items()},
        difference_of_means=difference_of_means(run.dense, setting.selection, site, prompts),
        exact_patch=exact_patch(run.dense, site, prompts, setting.plan.where),
        ridge_fit=ridge_report(run, site, ridge, setting.held_out),
    )


def _ridge(setting: Setting) -> Ridge:
    streams = [stream_at(model, setting.train, setting.site) for model in (setting.run.sparse, setting.run.dense)]
    return fit_ridge(streams[0], streams[1])


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The controls that are drawn at random."""

    norm: Float[Tensor, "prompt pos 1"]
    """Length of the reference set's edit at every token, and so of every control's."""
    directions: Float[Tensor, "draw d_dense"]
    channels: Float[Tensor, "draw d_dense"]
    """Unit vectors along sums of other channels' columns."""
    shuffled: list[Vectors]
    """Edits through shuffled decoders, before they are scaled."""
    untrained: list[Vectors]
    """Through untrained bridges, before they are scaled."""

    def edits(self) -> dict[str, Iterator[Vectors]]:
        """The edits by kind, made one after the other."""
        return {
            "random": along(self.directions, self.norm),
            "random_channels": along(self.channels, self.norm),
            "shuffled": (scaled(edit, self.norm) for edit in self.shuffled),
            "untrained": (scaled(edit, self.norm) for edit in self.untrained),
        }

    def norms(self) -> dict[str, float]:
        """Mean norms, over the decoders, of those that are scaled."""
        kinds = {"shuffled": self.shuffled, "untrained": self.untrained}
        return {name: sum(map(mean_norm, edits)) / len(edits) for name, edits in kinds.items()}


@torch.no_grad()
def draw_controls(setting: Setting, edit: Vectors) -> Drawn:
    """Random controls of the reference set, whose edit is given."""
    run, site, draws = setting.run, setting.site, setting.plan.draws
    generator = torch.Generator().manual_seed(setting.seed)
    moved = {channel for channels in setting.sets.values() for channel in channels}
    channels = setting.sets[setting.reference]
    directions = random_directions(draws, edit.shape[-1], generator)
    others = random_channels(run.bridges.directions(site), moved, len(channels), draws, generator)
    changes = sparse_changes(run, site, setting.prompts)
    decoders = random_decoders(setting, generator)
    shuffled, untrained = ([channel_edit(changes, columns, channels) for columns in maps] for maps in decoders)
    return Drawn(
        norm=edit.norm(dim=-1, keepdim=True),
        directions=directions,
        channels=others,
        shuffled=shuffled,
        untrained=untrained,
    )


def random_decoders(setting: Setting, generator: torch.Generator) -> tuple[Iterator[Columns], Iterator[Columns]]:
    """Shuffled decoders, and untrained bridges."""
    bridges, maps = setting.run.bridges, setting.plan.maps
    shuffled = shuffled_columns(bridges.directions(setting.site), maps, generator)
    return shuffled, untrained_columns(bridges, maps, setting.seed)
