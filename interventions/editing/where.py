"""Where an edit acts."""

from typing import Literal

Where = Literal["read", "stream"]
"""On the next sublayer's input alone, or on everything downstream."""
