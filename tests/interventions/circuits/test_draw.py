"""Circuits as figures: where nodes stand, and that what is drawn is what there is."""

import sys
from itertools import pairwise
from pathlib import Path

import networkx as nx
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from support.helpers import make_tiny_run
from support.report_runs import circuit, steering

from interventions.circuits.circuit import Circuit
from interventions.circuits.draw_effects import plot_effects
from interventions.circuits.picture_layout import isotonic, place_nodes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Circuit:
    return circuit(make_tiny_run(tmp_path_factory.mktemp("figures") / "run"))


def test_columns_follow_the_computation(found: Circuit) -> None:
    layout = place_nodes(found.to_networkx(links=True))
    assert layout.columns == sorted(layout.columns, key=lambda column: column.layer)
    assert set(layout.spots) == set(found.names)
    for edge in found.edges:
        assert layout.spots[edge.source].column < layout.spots[edge.target].column


def test_a_residual_channel_keeps_its_row_and_nodes_keep_apart(found: Circuit) -> None:
    graph = found.to_networkx(links=True)
    layout = place_nodes(graph)
    for source, target, kind in graph.edges(data="matrix"):
        if kind == "residual":
            assert layout.spots[source].row == layout.spots[target].row
    for column in range(len(layout.columns)):
        rows = sorted(spot.row for spot in layout.spots.values() if spot.column == column)
        assert all(after - before > 1 - 1e-9 for before, after in pairwise(rows))
        assert rows[0] >= 0
        assert rows[-1] <= layout.rows - 1


def test_layout_does_not_depend_on_the_order_of_edges(found: Circuit) -> None:
    graph = found.to_networkx()
    turned = nx.MultiDiGraph()
    turned.add_nodes_from(graph.nodes(data=True))
    turned.add_edges_from(reversed(list(graph.edges(data=True))))
    rows = [{name: spot.row for name, spot in place_nodes(each).spots.items()} for each in (graph, turned)]
    assert rows[0] == pytest.approx(rows[1])


def test_a_chain_is_drawn_straight() -> None:
    """Two chains over different channels: neither crosses the other, and each stays on a row."""
    graph = nx.MultiDiGraph()
    for channel in (5, 9):
        graph.add_node(f"r{channel}", layer=0, place="mlp.act_in", channel=channel)
        graph.add_node(f"n{channel}", layer=0, place="mlp.post_act", channel=channel)
        graph.add_node(f"w{channel}", layer=0, place="mlp.resid_delta", channel=channel)
        graph.add_edge(f"r{channel}", f"n{channel}", weight=-0.5, matrix="mlp_in")
        graph.add_edge(f"n{channel}", f"w{channel}", weight=0.5, matrix="mlp_out")
    spots = place_nodes(graph).spots
    assert {name: spot.row for name, spot in spots.items()} == {
        name: float(name.endswith("9")) for name in ("r5", "n5", "w5", "r9", "n9", "w9")
    }


def test_isotonic_by_hand() -> None:
    assert isotonic([3, 1, 2, 5]) == [2, 2, 2, 5]
    assert isotonic([]) == []


def test_an_empty_circuit_has_a_layout() -> None:
    assert place_nodes(nx.MultiDiGraph()) == ([], {}, 1)


def test_a_plot_draws_every_node_and_edge(found: Circuit, tmp_path: Path) -> None:
    figure = found.plot()
    (axes,) = figure.axes
    assert sum(isinstance(part, PathCollection) for part in axes.collections) == found.n_nodes
    links = sum(kind in ("residual", "qk") for _, _, kind in found.to_networkx(links=True).edges(data="matrix"))
    drawn = [len(part.get_segments()) for part in axes.collections if isinstance(part, LineCollection)]
    assert drawn == [links, found.n_edges]
    assert "UNCONTROLLED" in axes.get_title()
    figure.savefig(tmp_path / "circuit.png")


def test_plot_effects_is_ordered_and_says_what_it_leaves_out() -> None:
    figure = plot_effects({"a": 0.1, "b": 0.5, "c": -0.01}, most=2)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]
    assert "1 smaller" in axes.get_title()
    with pytest.raises(ValueError, match="--controls"):
        plot_effects({})


def test_plots_are_figures_and_pyplot_stays_out(found: Circuit) -> None:
    assert isinstance(steering().plot(), Figure)
    assert isinstance(found.plot(), Figure)
    assert not getattr(sys.modules.get("matplotlib.pyplot"), "get_fignums", list)()
