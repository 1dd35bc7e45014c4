"""What all matplotlib figures share: colours, and how a PNG is written."""

from pathlib import Path

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from sparse_model.io.atomic import replace_file

GREY = "#8a8f98"
# Of middling lightness from end to end: legible on white and on black.
DEPTH = LinearSegmentedColormap.from_list("depth", ["#4f7fe0", "#1fa09a", "#d08a1e", "#d0527f"])


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG whole or not at all; returns its path."""
    with replace_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return path
