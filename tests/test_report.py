"""The report: self-contained, escaped, and equal to the numbers it was made from."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import make_tiny_run

from bridges.evaluate import evaluate
from bridges.run import Run, update_metrics
from interventions.channels import Channel, read_nodes, save_channel
from interventions.report import COLUMNS, write_report
from interventions.report_figures import MOST_POINTS, history, smooth
from interventions.steering import Steering
from interventions.tasks import get_task

TASK = "single_double_quote"
EVIL = '<script>alert("x")</script>'
STRENGTH = [0.0, 0.5, 1.0]


class Token(NamedTuple):
    """A coloured token of the report."""

    title: str
    text: str
    classes: str


class Page(HTMLParser):
    """The parts of a report that the tests look at."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.examples: list[list[Token]] = []
        self.text = ""
        self._table = ""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        self._open.append(tag)
        if tag == "table":
            self._table = named.get("id") or named.get("class") or f"table{len(self.tables)}"
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
        elif tag == "pre":
            self.examples.append([])
        elif tag == "i" and "pre" in self._open:
            self.examples[-1].append(Token(named["title"] or "", "", named.get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[self._table][-1][-1] += data.strip()
        if self._open[-1:] == ["i"] and "pre" in self._open:
            last = self.examples[-1].pop()
            self.examples[-1].append(last._replace(text=last.text + data))


def steering(task: str = TASK, *, p95: float = 0.05) -> Steering:
    return Steering(
        task=task,
        strength=STRENGTH,
        channels={"1": [0.01, 0.1, 0.2], "2": [0.01, 0.3, 0.7321]},
        two_way={"1": [0.02, 0.1, 0.2], "2": [0.02, 0.3, 0.8123]},
        random_mean=[0.01, 0.012, 0.0234],
        random_p05=[0.01, 0.009, 0.0089],
        random_p95=[0.01, 0.03, p95],
        random_channels_mean=[0.01, 0.011, 0.0167],
        random_channels_p95=[0.01, 0.02, 0.0456],
        difference_of_means=[0.01, 0.2, 0.4567],
        prompts=8,
        random_draws=5,
        where="read",
        site=1,
        sets={"1": [3], "2": [3, 7]},
    )


def channel(name: str = "quote_type", *, share: float = 0.95, task: str | None = TASK) -> Channel:
    return Channel(
        name=name,
        site=1,
        indices=(3, 7),
        weights=(1.0, -0.5),
        description="positive in double quotes",
        selection={"task": task, "share": {"1": 0.5, "2": share}, "sets": {"1": [3], "2": [3, 7]}} if task else {},
    )


def training_records(count: int, n_sites: int) -> list[dict[str, Any]]:
    return [
        {"step": i + 1, "tokens": i, "ce": 5 - i / count, "lr": 1e-3, "nonzero_fraction": 0.5, "grad_rms": 1.0}
        | {f"nmse_{way}": [0.5 + site / 10 for site in range(n_sites)] for way in ("encode", "decode")}
        | {f"kl_{way}": 1.0 for way in ("dense_to_sparse", "sparse_to_dense")}
        for i in range(count)
    ]


def write_training_records(run: Run, count: int = 30) -> None:
    lines = [json.dumps(record) + "\n" for record in training_records(count, run.bridges.n_sites)]
    (run.folder / "metrics.jsonl").write_text("".join(lines))


def page_of(run: Run) -> Page:
    return Page(write_report(run.folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has every part of the report."""
    run = make_tiny_run(tmp_path_factory.mktemp("full") / "run")
    tokens = torch.randint(run.config.sparse.d_vocab, (4, 32))
    update_metrics(run.folder, **evaluate(run.dense, run.sparse, run.bridges, tokens, progress=False))
    update_metrics(
        run.folder,
        dense_task={TASK: {"pair_accuracy": 0.97, "p_right": 0.91, "p_wrong": 0.02}},
        steering={TASK: steering()._asdict()},
    )
    write_training_records(run)
    save_channel(run.folder, channel())
    return run


@pytest.fixture(scope="module")
def page(full: Run) -> Page:
    return page_of(full)


@pytest.fixture
def bare(tmp_path: Path) -> Run:
    """A run straight after training, not even evaluated."""
    return make_tiny_run(tmp_path / "run", n_layers=1)


def test_nothing_is_fetched(full: Run, page: Page) -> None:
    html = write_report(full.folder).read_text(encoding="utf-8")
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies
    assert policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert not re.search(r"https?://", re.sub(r'xmlns(?::\w+)?="http://www\.w3\.org/[\w/]+"', "", html))
    assert not re.search(r"@import|url\((?!#)", html)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert (value or "").startswith(("#", "data:")), (tag, name, value)
            assert not name.startswith("on")
    assert len(html) < 3_000_000
    assert not list(full.folder.glob("*.tmp"))


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {v for _, a in page.tags for n, v in a.items() if n in ("href", "xlink:href") and v and v[0] == "#"}
    assert {target[1:] for target in targets} <= set(ids)


def test_figures_take_the_page_colours(page: Page) -> None:
    svgs = sum(tag == "svg" for tag, _ in page.tags)
    assert svgs == 7
    styles = " ".join(attributes.get("style") or "" for _, attributes in page.tags)
    assert "currentColor" in styles
    assert not re.search(r"(fill|stroke): #(000000|ffffff|010203)", styles)


def test_site_table_equals_metrics(full: Run, page: Page) -> None:
    sites = json.loads((full.folder / "metrics.json").read_text())["sites"]
    rows = page.tables["site-table"]
    assert rows[0] == [column.title for column in COLUMNS]
    assert {column.field for column in COLUMNS} == set(sites[0])
    for row, site in zip(rows[1:-1], sites, strict=True):
        assert row == [format(site[column.field], column.form) for column in COLUMNS]
    mean = sum(site["nmse_encode"] for site in sites) / len(sites)
    assert rows[-1][2] == f"{mean:.3f}"


def test_overview_equals_metrics(full: Run, page: Page) -> None:
    metrics = json.loads((full.folder / "metrics.json").read_text())
    dense, sparse = metrics["dense"]["ce"], metrics["sparse"]
    for figure in (f"{dense:.3f}", f"{sparse['ce']:.3f}", f"{sparse['ce'] - dense:+.3f}", f"{sparse['nonzeros']:,}"):
        assert figure in page.text
    assert [row[:2] for row in page.tables["activations"][1:]] == [
        [name, f"{active:.1f}"] for name, active in sparse["activation_l0"].items()
    ]
    assert [row[1] for row in page.tables["matrices"][1:]] == [
        f"{entry['nonzeros']:,}" for entry in sparse["matrices"].values()
    ]


def test_steering_numbers_and_controls(page: Page) -> None:
    result = steering()
    last = page.tables["steering-summary"][-1]
    controls = ("random_mean", "random_p95", "random_channels_p95", "difference_of_means")
    wanted = [result.channels["2"][0], result.channels["2"][-1], *(getattr(result, name)[-1] for name in controls)]
    assert last[1:] == ["2 channels", *(f"{value:.4f}" for value in wanted)]
    assert "0.8123" in page.text  # two-way
    assert "5 random directions, 5–95 %" in page.text


def colour_blocks(page: Page) -> Iterator[list[Token]]:
    return (tokens for tokens in page.examples if tokens)


def test_coloured_activations_equal_the_reads(full: Run, page: Page) -> None:
    batch = get_task(TASK, full.tokenizer, max_tokens=64).sample(2, split="evaluation", seed=full.config.seed)
    blocks = list(colour_blocks(page))
    assert len(blocks) == 4 + 3
    for number, tokens in enumerate(blocks):
        ids = torch.tensor([[int(re.search(r"token (\d+)", token.title)[1]) for token in tokens]])  # type: ignore[index]
        if number < 4:
            pair, member = divmod(number, 2)
            assert torch.equal(ids[0], batch.tokens[pair, member, : int(batch.last[pair]) + 1])
        assert ids[0, 0] == full.tokenizer.eos_token_id
        with torch.no_grad():
            reads = read_nodes(full.sparse, ids, 1)[0]
        wanted = (1.0 * reads[:, 3] - 0.5 * reads[:, 7]) / (1.0**2 + 0.5**2)
        for token, value in zip(tokens, wanted.tolist(), strict=True):
            assert float(token.title.split()[0]) == pytest.approx(value, abs=6e-4)
            assert token.classes == ("p" if value > 0 else "m" if value < 0 else "")


def test_text_is_whole_and_line_ends_are_visible(full: Run, page: Page) -> None:
    batch = get_task(TASK, full.tokenizer, max_tokens=64).sample(2, split="evaluation", seed=full.config.seed)
    shown = "".join(token.text for token in next(colour_blocks(page)))
    assert shown == "<|endoftext|>" + batch.prompts[0][0].replace("\n", "↵\n")


def test_untrusted_text_stays_text(bare: Run) -> None:
    save_channel(bare.folder, channel(EVIL, task=None))
    update_metrics(bare.folder, steering={EVIL: steering(EVIL)._asdict()})
    page = page_of(bare)
    assert not any(tag == "script" for tag, _ in page.tags)
    assert page.text.count(EVIL) >= 3  # the channel, the summary, the task


def test_missing_parts_name_their_command(bare: Run) -> None:
    page = page_of(bare)
    for script in ("train_bridge.py", "find_channel.py", "steer.py"):
        assert re.search(rf"scripts/{script} --run \S+", page.text)
    assert "svg" not in {tag for tag, _ in page.tags}
    write_training_records(bare)
    save_channel(bare.folder, channel())
    page = page_of(bare)
    assert "find_channel.py" not in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 6


def test_a_channel_of_an_unknown_task_shows_held_out_text(bare: Run) -> None:
    save_channel(bare.folder, channel(task="no_such_task"))
    page = page_of(bare)
    assert "unknown task" in page.text
    assert len(list(colour_blocks(page))) == 3


def test_warnings(bare: Run) -> None:
    save_channel(bare.folder, channel(share=0.7))
    update_metrics(
        bare.folder,
        dense_task={TASK: {"pair_accuracy": 0.5, "p_right": 0.5, "p_wrong": 0.4}},
        steering={TASK: steering(p95=0.8)._asdict()},
    )
    text = page_of(bare).text
    for sentence in ("does not solve single_double_quote", "70%", "above 0.1", "no more than the 95th percentile"):
        assert sentence in text


def test_a_good_run_has_no_steering_warning(page: Page) -> None:
    for sentence in ("does not solve", "do not carry", "above 0.1", "no more than"):
        assert sentence not in page.text


def test_errors_name_the_file(bare: Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run at"):
        write_report(tmp_path / "nothing")
    save_channel(bare.folder, Channel(name="far", site=0, indices=(999,), weights=(1.0,)))
    with pytest.raises(ValueError, match=r"channels\.json.*'far'.*999"):
        write_report(bare.folder)
    (bare.folder / "channels.json").unlink()
    (bare.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        write_report(bare.folder)
    (bare.folder / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is damaged"):
        write_report(bare.folder)
    assert not (bare.folder / "report.html").exists()


def test_a_corpus_that_is_gone_is_replaced_by_generated_text(bare: Run) -> None:
    config = json.loads((bare.folder / "config.json").read_text()) | {"corpus": "./gone.txt"}
    (bare.folder / "config.json").write_text(json.dumps(config))
    save_channel(bare.folder, channel())
    assert "Generated document 1" in page_of(bare).text


def test_long_histories_are_thinned() -> None:
    past = history(training_records(5 * MOST_POINTS, 3))
    assert past.nmse_encode.shape == (MOST_POINTS, 3)
    assert past.step[0] == 3.0  # the mean of steps 1 .. 5
    assert np.allclose(smooth(np.ones(50)), 1)
