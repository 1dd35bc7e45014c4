"""What each node of a circuit does, as a matplotlib figure."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from interventions.circuits.controls import IDLE, is_idle
from interventions.circuits.draw import MINUS
from interventions.figures import GREY


def plot_effects(effects: Mapping[str, int | float], *, most: int = 40) -> Figure:
    """Necessity node by node: the rise of the circuit's loss when each is deleted, largest first.

    `effects` are those of a circuit's controls, `circuit.controls["node_effects"]`, or of `measures.node_effects`; at
    most `most` bars. Below the dashed line a node does nothing. Raises ValueError for no effects.
    """
    if not effects:
        raise ValueError("there are no effects to plot: run scripts/find_circuit.py with --controls")
    ranked = sorted(effects.items(), key=lambda entry: -entry[1])[:most]
    figure = Figure(figsize=(6.4, 0.8 + 0.2 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    names, values = zip(*ranked, strict=True)
    axes.barh(range(len(ranked)), values, color=[GREY if is_idle(value) else MINUS for value in values], height=0.7)
    axes.axvline(IDLE, color=GREY, ls="--", lw=1)
    axes.set_yticks(range(len(ranked)), names, fontsize=7, family="monospace")
    axes.invert_yaxis()
    axes.set_xlabel("rise of the task loss without the node, nats")
    axes.spines[["top", "right"]].set_visible(False)
    left_out = len(effects) - len(ranked)
    axes.set_title(f"effect of each node{f' ({left_out} smaller ones left out)' if left_out else ''}", fontsize=10)
    return figure
