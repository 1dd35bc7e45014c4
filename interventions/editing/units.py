"""The units in which a sparse channel moves the dense model."""

from typing import Literal

Units = Literal["exact", "paper"]
"""exact: every token's own scales, of the sparse stream and of the dense norm. paper: both averaged over held-out text
(A.4), which moves a channel too far at tokens whose sparse stream is short."""
