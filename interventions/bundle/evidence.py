"""The evidence that a named channel means what its name says: how well it tells in natural text where the feature is.

Everything is measured on evaluation files; thresholds come from selection files. `interventions.finding.evidence`
measures it.
"""

from dataclasses import dataclass

LEAST_AUC = 0.8
LEAST_PRECISION = 0.5


@dataclass(frozen=True, kw_only=True)
class Detection:
    """What one reading says of the feature, token by token."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    auc: float
    """P(a token inside has more than one that is not), ties counting half."""
    auc_twin: float | None
    """The same against tokens of the twin class alone; None where there are none."""
    threshold: float
    """Chosen on selection text: the one of largest F1 there. From it on a token counts as detected."""
    precision: float
    """Share of the detected tokens that are inside; 0 where none is detected."""
    recall: float
    """Share of the tokens inside that are detected."""
    inside: float
    """Mean there."""
    twin: float | None
    """Mean in the twin class; None where it has no token."""
    outside: float
    """Mean in neither."""

    def cells(self) -> list[str]:
        """The figures of a table's row: AUC, AUC against the twin, precision, recall, and the three means."""
        figures = (self.auc, self.auc_twin, self.precision, self.recall)
        means = (self.inside, self.twin, self.outside)
        return [*("" if f is None else f"{f:.2f}" for f in figures), *("" if m is None else f"{m:+.2f}" for m in means)]


@dataclass(frozen=True, kw_only=True)
class MarkedTokens:
    """How much text there is of one split."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    files: int
    inside: int
    """Tokens, in contexts of every kind."""
    twin: int
    outside: int
    new_inside: int
    """Tokens in contexts that the task's templates do not have."""
    new_twin: int


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """A token of the evaluation text and those around it."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    value: float
    """What the encoder reads of the channel there."""
    label: str
    """inside, twin or outside."""
    before: tuple[int, ...]
    """Token ids."""
    token: int
    behind: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Readings:
    """The channel as the encoder reads it off the dense stream, as the sparse model has it; a probe of that stream."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    encoder: Detection
    sparse: Detection
    probe: Detection

    def named(self) -> list[tuple[str, Detection]]:
        """The readings with their names in tables."""
        return [("off the dense model", self.encoder), ("sparse model", self.sparse), ("probe", self.probe)]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Detection figures of a named channel on natural text."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    task: str
    inside: str
    """The feature in words: in a double-quoted string."""
    twin: str
    """The other member's: in a single-quoted string."""
    sign: int
    """-1 where the feature is that of the task's member 1, for which channels are negative: values are turned round."""
    text: str
    """What the files are."""
    selection: MarkedTokens
    evaluation: MarkedTokens
    new: Readings
    """In contexts that the task's templates do not have. What is outside belongs to both."""
    all: Readings
    """In contexts of every kind, at the same thresholds."""
    top: tuple[Excerpt, ...]
    """Where the encoder reads most, once a row of text."""
    bottom: tuple[Excerpt, ...]

    @property
    def faults(self) -> list[str]:
        """What is too little, in contexts that the templates do not have: AUC under .8, precision under .5."""
        names = {"off the dense model": self.new.encoder, "in the sparse model": self.new.sparse}
        found = []
        for name, detection in names.items():
            for figure, value, least in (
                ("AUC", detection.auc, LEAST_AUC),
                ("precision", detection.precision, LEAST_PRECISION),
            ):
                if not value >= least:
                    found.append(f"{figure} {name} {value:.2f}, under {least:g}")
        return found

    @property
    def verdict(self) -> str:
        """Good or poor, in words."""
        if self.faults:
            return f"poor evidence that it means {self.inside!r}: {'; '.join(self.faults)}"
        return f"good evidence that it means {self.inside!r}"
