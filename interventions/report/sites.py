"""The report's faithfulness part: the table of sites as a heat map, and the hybrids' loss beside the models' own."""

from typing import Any, NamedTuple

from interventions.charts import BLUE, GREY, INK, ORANGE, Chart, Series, numbers

_RECOVERED = "Share of the loss that the hybrid recovers: 0 is the site replaced by its mean, 1"


class Column(NamedTuple):
    """A column of the per-site table."""

    field: str
    title: str
    tip: str
    form: str = ".3f"
    worst: float | None = None
    """The value that is coloured fully; None: not coloured."""
    best: float = 0.0
    """The value that is not coloured at all."""


COLUMNS = (
    Column("site", "site", "Residual site: 0 is the embedding, 2L the input of the unembedding", "d"),
    Column("label", "read by", "What reads the residual stream at this site", "s"),
    Column("nmse_encode", "NMSE", "Error of the dense → sparse bridge; 1 predicts the mean", worst=1),
    Column("explained_variance_encode", "EV", "Explained variance: 1 − NMSE, but a constant error is free"),
    Column("kl_dense_to_sparse", "KL", "KL(dense ‖ hybrid that starts dense, ends sparse), nats", worst=1),
    Column("ce_dense_to_sparse", "CE", "Next-token loss of the dense → sparse hybrid, nats"),
    Column("recovered_dense_to_sparse", "recovered", f"{_RECOVERED} the sparse model alone", worst=0, best=1),
    Column("nmse_decode", "NMSE", "Error of the sparse → dense bridge; 1 predicts the mean", worst=1),
    Column("explained_variance_decode", "EV", "Explained variance: 1 − NMSE, but a constant error is free"),
    Column("kl_sparse_to_dense", "KL", "KL(dense ‖ hybrid that starts sparse, ends dense), nats", worst=1),
    Column("ce_sparse_to_dense", "CE", "Next-token loss of the sparse → dense hybrid, nats"),
    Column("recovered_sparse_to_dense", "recovered", f"{_RECOVERED} the dense model alone", worst=0, best=1),
    Column("dead_reads", "dead reads", "Channels of the sparse read that are zero at every held-out token", "d"),
)
"""All fields of `SiteReport`."""
GROUPS = (("", 2), ("dense → sparse, by the encoder", 5), ("sparse → dense, by the decoder", 5), ("", 1))
"""Headings above the columns, and how many each spans."""


class Cell(NamedTuple):
    """A cell of the table."""

    text: str
    heat: int | None
    """Colour in tenths, 0 .. 10; None for none."""
    left: bool


def site_rows(metrics: dict[str, Any]) -> list[list[Cell]]:
    """The table's cells: a row per site, then the means."""
    sites = metrics.get("sites", [])
    if not sites:
        return []
    rows = [[_cell(column, site[column.field]) for column in COLUMNS] for site in sites]
    mean = site_means(metrics)
    last = [
        _cell(column, mean[column.field])
        if column.field in mean
        else Cell("mean" if column.form == "s" else "", None, True)
        for column in COLUMNS
    ]
    return [*rows, last]


def site_means(metrics: dict[str, Any]) -> dict[str, float]:
    """Means over the sites of the table's real-valued columns."""
    sites = metrics.get("sites", [])
    fields = [column.field for column in COLUMNS if column.form == ".3f"]
    return {field: sum(site[field] for site in sites) / len(sites) for field in fields} if sites else {}


def _cell(column: Column, value: Any) -> Cell:
    heat = None
    if column.worst is not None and value == value:
        share = (value - column.best) / (column.worst - column.best)
        heat = round(10 * min(max(share, 0), 1))
    return Cell(format(value, column.form).replace("-", "−"), heat, column.form == "s")


def hybrid_chart(metrics: dict[str, Any]) -> list[Chart]:
    """The hybrids' loss at every site between the losses of the two models alone; none before evaluation."""
    sites = metrics.get("sites", [])
    if not sites:
        return []

    def flat(name: str, value: float, colour: str) -> Series:
        return Series(name, numbers([value] * len(sites)), colour, "dash")

    return [
        Chart(
            id="hybrids",
            title="Loss of the hybrids",
            caption="Next-token loss on held-out text of the hybrid that crosses at each site, beside either model.",
            x=[float(site["site"]) for site in sites],
            x_title="site",
            y_title="nats per token",
            series=[
                Series("dense → sparse", numbers(site["ce_dense_to_sparse"] for site in sites), BLUE, "dots"),
                Series("sparse → dense", numbers(site["ce_sparse_to_dense"] for site in sites), ORANGE, "dots"),
                flat("dense alone", metrics["dense"]["ce"], INK),
                flat("sparse alone", metrics["sparse"]["ce"], GREY),
            ],
            x_labels=[site["label"] for site in sites],
        )
    ]
