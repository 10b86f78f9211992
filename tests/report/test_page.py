"""The page of a study: well-formed, by itself, and safe whatever records say."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flower_mcepl import Topology, simulate
from flower_mcepl.cli import app
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.report.page.elements import Html, element
from flower_mcepl.report.page.report_page import report_page
from flower_mcepl.report.page.style import CSS
from flower_mcepl.report.plots.gallery import Gallery
from flower_mcepl.report.plots.subjects import subjects_of
from flower_mcepl.report.tables import cells, footnotes, titles
from flower_mcepl.studies import compare
from flower_mcepl.studies.sources import read_source
from tests.fleet.agents import make_fleet
from tests.oracles.html_page import Page

pytest.importorskip("matplotlib")

LOADS = {"src", "href", "srcset", "data", "poster", "action", "background", "xlink:href"}
EVIL = (
    '</title></pre><script>alert("1")</script><img src=x onerror=alert(2)>'
    "&amp;\"'\x00\x1b[31m $\\frac{"
)


def assert_by_itself(page: Page, text: str) -> None:
    """Nothing is loaded, nothing runs."""
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "svg"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in LOADS:
                assert str(value).startswith("data:image/png;base64,iVBORw0KGgo")
    assert not re.search(r"@import|url\(|http-equiv", text)
    assert not re.search(r"<[^>]*(https?:)?//", re.sub(r"base64,[^\"]*", "", text))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    record = RunRecord.create(
        tmp_path_factory.mktemp("runs"), name="ring", config={"run_config": {"seed": 7}}
    )
    simulate(make_fleet(3), Topology.ring(3), num_rounds=2, record=record)
    return record.path


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawing out, which takes most of the time."""
    monkeypatch.setattr(
        "flower_mcepl.report.page.report_page.draw_gallery",
        lambda runs: Gallery(subjects_of(runs)[0]),
    )


def report(source: Path, out: Path) -> str:
    result = CliRunner().invoke(
        app, ["report", str(source), "--out", str(out)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert result.output == f"{out}\n"
    return out.read_text(encoding="utf-8")


def test_the_page_of_a_study_holds_everything(small_study: Path, small_study_page: Path) -> None:
    text = small_study_page.read_text(encoding="utf-8")
    page = Page(text)
    assert_by_itself(page, text)
    assert page.declarations == ["DOCTYPE html"]
    assert page.tags[0] == ("html", {"lang": "en"})
    assert page.text("h1") == ["study"]
    assert page.text("p") == [page.text("p")[0]]
    assert page.text("p")[0].startswith("3 runs of 2 combinations of settings, of 20")
    assert [heading for heading in page.text("h2") if heading.strip()] == [
        *("Results", "Pictures", "What was run", "Run by run", "How the numbers are defined"),
    ]

    source = read_source(small_study)
    comparison = compare(source.runs, target=0.2)
    assert page.text("th")[: len(titles(comparison))] == titles(comparison)
    for row in cells(comparison):
        for cell in row:
            assert cell in page.text("td")
    assert set(footnotes(comparison)) <= set(page.text("li"))
    assert "to 0.2" in page.text("th")

    assert small_study.read_text() in page.text("pre")
    assert json.loads((source.runs[0].path / "config.json").read_text())["versions"][
        "torch"
    ] in page.text("td")
    assert [alt["alt"].partition(".")[0] for alt in page.all("img") if alt["alt"]] == [
        *(
            "Accuracy by round",
            "Accuracy by bytes",
            "Spread over the agents",
            "Communication graph",
            "Who holds what",
        ),
        *("Agreement of masks", "Density of filters"),
    ]
    assert {run.path.name for run in source.runs} <= set(page.text("summary"))
    assert "Data and masks: mcepl" in page.text("summary")
    assert "Who held what" in page.text("summary")
    assert "training / test examples of each class" in page.text("li")
    assert any("agents of dsgd hold no mask" in line for line in page.text("li"))


@pytest.mark.usefixtures("no_pictures")
def test_a_studys_folder_gives_the_same_page(small_study: Path) -> None:
    out = small_study.parent / "out"
    by_file, by_folder = (
        Page(report_page(read_source(small_study))),
        Page(report_page(read_source(out))),
    )
    assert by_folder.texts == by_file.texts
    assert small_study.read_text() in by_folder.text("pre")
    assert (out / "study.toml").read_text() == small_study.read_text()


@pytest.mark.usefixtures("no_pictures")
def test_runs_that_are_left_out_are_named(small_study: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_study.parent / "out", tmp_path / "out"))
    killed = sorted(folder.glob("mcepl*"))[0]
    (killed / "summary.json").unlink()
    page = Page(report_page(read_source(folder)))
    assert f"left out: {killed.name}, which is without a summary" in page.text("li")


def test_the_page_of_a_record(record: Path) -> None:
    CliRunner().invoke(app, ["report", str(record)], catch_exceptions=False)
    text = (record / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert_by_itself(page, text)
    assert page.text("title") == ["ring - flower-mcepl"]
    assert len(page.all("img")) == 7
    (table,) = [text for text in page.text("pre") if "personalized accuracy" in text]
    assert table.startswith("ring: finished, 3 agents, 2 rounds")
    (run,) = [details for details in page.all("details") if "open" in details]
    assert run == {"open": None}


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_was_killed_has_a_page(record: Path, tmp_path: Path) -> None:
    killed = Path(shutil.copytree(record, tmp_path / "killed"))
    (killed / "summary.json").unlink()
    page = Page(report_page(read_source(killed)))
    assert "The run is not finished; what follows is as far as it got." in page.text("p")


@pytest.mark.slow
def test_hostile_records_stay_text(record: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(record, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config |= {
        "name": EVIL,
        "run_config": {EVIL: EVIL, "lone": "\ud800"},
        "versions": {EVIL: EVIL},
    }
    config["agents"][0]["classes"] = [EVIL]
    (copy / "config.json").write_text(json.dumps(config))
    text = report(copy, tmp_path / "new" / "page.html")
    page = Page(text)
    assert_by_itself(page, text)
    shown = EVIL.replace("\x00", r"\x00").replace("\x1b", r"\x1b")
    assert page.text("h1") == [shown]
    assert page.text("title") == [f"{shown} - flower-mcepl"]
    assert page.text("td").count(shown) == 4
    assert not {"\x00", "\x1b"} & set(text)


@pytest.mark.usefixtures("no_pictures")
def test_a_hostile_study_file_stays_text(record: Path, tmp_path: Path) -> None:
    shutil.copytree(record, tmp_path / "out" / EVIL.replace("/", "").replace("\x00", "")[:40])
    (tmp_path / "out" / "study.toml").write_bytes(EVIL.encode() + b"\xff")
    page = Page(report_page(read_source(tmp_path / "out")))
    assert any(text.startswith("</title></pre><script>") for text in page.text("pre"))


def test_elements_escape_all_but_html() -> None:
    assert element("p", "<b>", Html("<i></i>"), title='"', open=True, hidden=False) == (
        '<p title="&quot;" open>&lt;b&gt;<i></i></p>'
    )
    assert element("td", "1", class_="number") == '<td class="number">1</td>'
    assert element("p", "a\r\n\tb\x0bc") == "<p>a\r\n\tb�c</p>"


def test_the_check_of_pages_can_fail() -> None:
    with pytest.raises(AssertionError):
        Page("<p><b></p></b>")
    with pytest.raises(AssertionError):
        Page("<p>")
    for bad in (
        "<img src='http://x/y.png'>",
        "<img src='a.png'>",
        "<script></script>",
        "<p onclick='x'></p>",
    ):
        with pytest.raises(AssertionError):
            assert_by_itself(Page(bad), bad)


def test_the_style_is_for_light_dark_paper_and_wide_tables() -> None:
    for words in (
        "prefers-color-scheme: dark",
        "@media print",
        "overflow-x: auto",
        "color-scheme: light dark",
    ):
        assert words in CSS
    assert CSS.count("{") == CSS.count("}")


def test_nothing_finished_is_told(small_study: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(re.sub("out = .*", f"out = '{tmp_path}/none'", small_study.read_text()))
    result: Any = CliRunner().invoke(app, ["report", str(file)])
    assert "no run of" in str(result.exception)


def test_help_teaches() -> None:
    assert (
        "flower-mcepl report runs/ablation\n"
        in CliRunner().invoke(app, ["report", "--help"]).output
    )
