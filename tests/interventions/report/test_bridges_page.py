"""Every number of the page on the bridges equals metrics.json: the table of sites, the hybrids, the sparse model."""

import json
import statistics
from typing import Any

import pytest
from support.report_page import Page

from bridges.run_folder import Run
from interventions.report.sites import COLUMNS, GROUPS


@pytest.fixture(scope="session")
def metrics(full: Run) -> dict[str, Any]:
    return json.loads((full.folder / "metrics.json").read_text())


def test_the_table_of_sites(metrics: dict[str, Any], page: Page) -> None:
    sites = metrics["sites"]
    _, titles, *rows, last = page.tables["site-table"]
    assert titles == [column.title for column in COLUMNS]
    assert {column.field for column in COLUMNS} == set(sites[0])
    assert sum(span for _, span in GROUPS) == len(COLUMNS)
    ways = (("encode", "dense_to_sparse"), ("decode", "sparse_to_dense"))
    for row, site in zip(rows, sites, strict=True):
        figures = [
            f"{site[f'{name}_{way}']:.3f}"
            for coder, hybrid in ways
            for name, way in (
                ("nmse", coder),
                ("explained_variance", coder),
                ("kl", hybrid),
                ("ce", hybrid),
                ("recovered", hybrid),
            )
        ]
        assert row[:2] == [str(site["site"]), site["label"]]
        assert [cell.replace("−", "-") for cell in row[2:-1]] == figures
        assert row[-1] == str(site["dead_reads"])
    for at, mean in enumerate(last[2:-1], 2):
        shown = [float(row[at].replace("−", "-")) for row in rows]
        assert float(mean.replace("−", "-")) == pytest.approx(statistics.fmean(shown), abs=1.1e-3)


def test_colours_go_from_the_best_to_the_worst(metrics: dict[str, Any], page: Page) -> None:
    """Ten tenths: 0 is white and 1 full for errors, the other way round for the recovered share."""
    cells = page.html[page.html.index('id="site-table"') :]
    cells = cells[: cells.index("</table>")]
    heats = [int(part.split('"')[0].split()[0]) for part in cells.split('class="h')[1:] if part[0].isdigit()]
    wanted = []
    fields = [f"{name}_{way}" for way in ("encode", "decode") for name in ("nmse",)]
    order = [fields[0], "kl_dense_to_sparse", "recovered_dense_to_sparse"]
    order += [fields[1], "kl_sparse_to_dense", "recovered_sparse_to_dense"]
    means = {name: statistics.fmean(site[name] for site in metrics["sites"]) for name in order}
    for site in [*metrics["sites"], means]:
        for name in order:
            share = min(max(site[name], 0), 1)
            wanted.append(round(10 * (1 - share if "recovered" in name else share)))
    assert heats == wanted


def test_the_loss_of_the_hybrids(metrics: dict[str, Any], page: Page) -> None:
    chart, sites = page.data["charts"]["hybrids"], metrics["sites"]
    curves = {series["name"]: series["values"] for series in chart["series"]}
    assert chart["x"] == [0, 1, 2, 3, 4]
    assert chart["x_labels"] == ["attn.0", "mlp.0", "attn.1", "mlp.1", "unembed"]
    assert curves == {
        "dense → sparse": pytest.approx([site["ce_dense_to_sparse"] for site in sites], rel=1e-3),
        "sparse → dense": pytest.approx([site["ce_sparse_to_dense"] for site in sites], rel=1e-3),
        "dense alone": pytest.approx([metrics["dense"]["ce"]] * 5, rel=1e-3),
        "sparse alone": pytest.approx([metrics["sparse"]["ce"]] * 5, rel=1e-3),
    }


def test_mixed_paths_and_sparsity(metrics: dict[str, Any], page: Page) -> None:
    words = " ".join(page.words["bridges"].split())
    paths, sites, sparse = metrics["paths"], metrics["sites"], metrics["sparse"]
    crossings = [site[f"kl_{way}"] for site in sites for way in ("dense_to_sparse", "sparse_to_dense")]
    assert f"KL(dense ‖ path) is {paths['kl']:.3f} nats per token, the mean of {paths['n']} paths." in words
    assert f"single crossings average {sum(crossings) / len(crossings):.3f}." in words
    assert f"{sparse['nonzeros']:,} nonzero weights, {100 * sparse['nonzero_fraction']:.3g} % of all." in words


def test_nonzeros_by_matrix_are_those_of_the_weights(full: Run, page: Page) -> None:
    state = full.sparse.state_dict()
    rows = page.tables["matrices"][1:]
    assert len(rows) >= 8
    for name, nonzeros, share in rows:
        assert nonzeros == f"{int(state[name].count_nonzero()):,}"
        assert share == f"{int(state[name].count_nonzero()) / state[name].numel():.5f}"
    total = sum(int(nonzeros.replace(",", "")) for _, nonzeros, _ in rows)
    assert page.cards["nonzero weights"][0] == f"{total:,}"


def test_activations_by_location(metrics: dict[str, Any], page: Page) -> None:
    sparse = metrics["sparse"]
    assert page.tables["activations"][1:] == [
        [name, f"{active:.1f}", str(sparse["dead_channels"][name])] for name, active in sparse["activation_l0"].items()
    ]
