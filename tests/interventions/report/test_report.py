"""The report as a file: self-contained, escaped, and whole."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from support.report_page import Page, page_of
from support.report_runs import (
    EVIL,
    TASK,
    channel,
    circuit,
    steering,
    write_training_records,
)

from bridges.run_folder import Run, open_run, update_metrics
from interventions.bundle.channels import Channel, save_channel
from interventions.report.page import write_report
from sparse_model.data.corpus import load_blocks
from sparse_model.data.prepare import corpus_config
from sparse_model.io.reading import SEAL

# The namespace of SVG, and where the plotting library says that it is from: neither is ever fetched.
HARMLESS = ("http://www.w3.org/2000/svg", "https://github.com/leeoniya/uPlot")


def test_nothing_is_fetched(full: Run, page: Page) -> None:
    html = page.html
    for known in HARMLESS:
        html = html.replace(known, "")
    assert not re.search(r"https?://|@import|url\((?!#)|\beval\(|new Function|innerHTML", html)
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "img")
        assert "style" not in attributes  # the policy would not apply it
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert (value or "").startswith(("#", "data:")), (tag, name, value)
            assert not name.startswith("on")
    assert len(html) < 5_000_000
    assert not list(full.folder.glob("*.tmp"))


def test_the_policy_lets_in_only_the_page_itself(page: Page) -> None:
    policy = page.policy
    assert policy["default-src"] == ["'none'"]
    assert policy["require-trusted-types-for"] == ["'script'"]
    code = [raw for raw in page.raw if not raw.startswith("{")]
    digests = [f"'sha256-{base64.b64encode(hashlib.sha256(raw.encode()).digest()).decode()}'" for raw in code]
    assert [*policy["style-src"], *policy["script-src"]] == digests
    assert not {"'unsafe-inline'", "'unsafe-eval'"} & {source for sources in policy.values() for source in sources}


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {v for _, a in page.tags for n, v in a.items() if n in ("href", "xlink:href") and v and v[0] == "#"}
    assert {target[1:] for target in targets} <= set(ids)


def test_every_figure_has_its_data(page: Page) -> None:
    figures = [a["data-chart"] for _, a in page.tags if "data-chart" in a]
    assert sorted(map(str, figures)) == sorted(page.data["charts"])
    assert len(figures) == 5 + 1 + 1 + 2 + 1  # training, hybrids, steering, bases, histogram
    for chart in page.data["charts"].values():
        curves = [series["values"] for series in chart["series"]]
        curves += [band[side] for band in chart["bands"] for side in ("low", "high")]
        assert {len(curve) for curve in curves} == {len(chart["x"])}


def test_untrusted_text_stays_text(bare: Run) -> None:
    save_channel(bare.folder, channel(EVIL, task=None))
    update_metrics(bare.folder, steering={EVIL: steering(EVIL)._asdict()})
    circuit(bare)
    page = page_of(bare)
    assert sum(tag == "script" for tag, _ in page.tags) == 3  # the theme's, the data, the page's
    assert page.text.count(EVIL) >= 3  # the channel, the summary, the task
    data = next(raw for raw in page.raw if raw.startswith("{"))
    assert not set("<>&") & set(data)
    assert EVIL in str(page.data["circuits"][TASK]["nodes"])


def test_missing_parts_are_left_out_and_named_with_their_command(bare: Run, full: Run, page: Page) -> None:
    def parts(page: Page) -> list[str]:
        return [str(a["id"]) for tag, a in page.tags if tag in ("section", "footer")]

    alone = page_of(bare)
    assert parts(alone) == ["overview", "config"]
    filled = ["training", "bridges", "steering", "bases", "tasks", "circuits", "channels"]
    assert parts(page) == ["overview", *filled, "config"]
    for shown in (alone, page):
        assert re.findall(r'<a href="#(\w+)">', shown.html.partition("</nav>")[0]) == parts(shown)
    for command in ("evaluate", "find-channel", "steer", "compare-bases", "find-circuit"):
        assert re.search(rf"sparse-bridges {command} --run \S+", alone.text)
    assert re.search(r"sparse-bridges solved-tasks \S+", alone.text)
    assert "What can be added" not in page.text
    assert alone.data["charts"] == {}
    write_training_records(bare)
    save_channel(bare.folder, channel())
    alone = page_of(bare)
    assert "find-channel" not in alone.text
    assert parts(alone) == ["overview", "training", "channels", "config"]
    assert len(alone.data["charts"]) == 5 + 1


def test_an_incomplete_part_is_named(full: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(full.folder, tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics.pop(SEAL, None)  # of an earlier version, or of another hand
    for part, name in (("paths", "kl"), ("training", "corpus"), ("circuit_size", "ce"), ("sparse", "nonzeros")):
        lacking = metrics | {part: {key: value for key, value in metrics[part].items() if key != name}}
        (folder / "metrics.json").write_text(json.dumps(lacking))
        with pytest.raises(ValueError, match=rf"metrics\.json .*: key {part}\.{name} is missing; .*bridges evaluate"):
            write_report(folder)


def test_a_mistake_in_a_template_is_not_put_down_to_the_run(bare: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interventions.report.page.absent_parts", lambda *_: [1])  # not what the template takes
    with pytest.raises(TypeError):
        write_report(bare.folder)
    monkeypatch.setattr("interventions.report.page._SECTIONS", ())
    monkeypatch.setattr("interventions.report.page._assets", dict)
    monkeypatch.setattr("interventions.report.page.absent_parts", lambda *_: [])
    with pytest.raises(UndefinedError, match="policy"):
        write_report(bare.folder)


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
    (bare.folder / "metrics.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"metrics\.json is damaged \(it holds a, no figures\)"):
        write_report(bare.folder)
    assert not (bare.folder / "report.html").exists()


def test_a_corpus_that_is_gone_is_replaced_by_generated_text(bare: Run) -> None:
    config = json.loads((bare.folder / "config.json").read_text()) | {"corpus": "./gone.txt"}
    (bare.folder / "config.json").write_text(json.dumps(config))
    save_channel(bare.folder, channel())
    assert "Generated document 1" in page_of(bare).text


def test_a_run_of_others_that_names_my_files_does_not_show_them(
    bare: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for number in range(20):
        (mine / f"{number}.txt").write_text("my zanzibar secret\n" * 500)
    monkeypatch.chdir(mine)
    monkeypatch.setenv("SPARSE_BRIDGES_CACHE", str(tmp_path / "cache"))
    path = bare.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"corpus": "."}))
    save_channel(bare.folder, channel())
    page = page_of(bare)
    assert "zanzibar" not in page.html
    load_blocks(corpus_config(open_run(bare.folder).config), bare.tokenizer, bare.config.sparse.n_ctx, progress=False)
    assert "zanzibar" in page_of(bare).text.replace("\n", "")  # so it would have been
