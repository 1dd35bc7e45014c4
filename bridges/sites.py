"""Residual sites: the only place that knows their indices and hook names.

Site i = 0 .. 2L of an L-layer model lies before sublayer i: before each attention (even i), before each MLP (odd i),
and after the last MLP (i = 2L), where the unembedding reads (paper 3.3).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One residual site of an n_layers-deep model. An index outside 0 .. 2L is a ValueError."""

    index: int
    n_layers: int

    def __post_init__(self) -> None:
        if not 0 <= self.index <= 2 * self.n_layers:
            raise ValueError(
                f"site {self.index} is out of range: {self.n_layers} layers have sites 0 .. {2 * self.n_layers}"
            )

    @property
    def is_final(self) -> bool:
        """Whether the unembedding reads here."""
        return self.index == 2 * self.n_layers

    @property
    def layer(self) -> int:
        """The layer whose sublayer reads here (the last layer at the final site)."""
        return min(self.index // 2, self.n_layers - 1)

    @property
    def reader(self) -> str:
        """What reads here: "attn", "mlp" or "unembed"."""
        return "unembed" if self.is_final else ("attn", "mlp")[self.index % 2]

    @property
    def label(self) -> str:
        """Short name: "attn.1", "mlp.0", "unembed"."""
        return "unembed" if self.is_final else f"{self.reader}.{self.layer}"

    @property
    def norm_hook(self) -> str:
        """Prefix of the hooks around the reading norm: hook_in is the stream, hook_out what the sublayer reads."""
        if self.is_final:
            return "ln_final"
        return f"blocks.{self.layer}.ln{1 + self.index % 2}"

    @property
    def read_hook(self) -> str:
        """Hook of the sparse model's read: post-norm and, before a sublayer, post-AbsTopK."""
        return "ln_final.hook_normalized" if self.is_final else f"blocks.{self.layer}.{self.reader}.hook_in"

    @property
    def stream_hook(self) -> str:
        """Hook of the residual stream at this site in either model (for reading; see `interventions` for edits)."""
        if self.is_final:
            return f"blocks.{self.layer}.hook_resid_post"
        return f"blocks.{self.layer}.hook_resid_{('pre', 'mid')[self.index % 2]}"


def all_sites(n_layers: int) -> list[Site]:
    """Sites 0 .. 2L in order."""
    return [Site(i, n_layers) for i in range(2 * n_layers + 1)]
