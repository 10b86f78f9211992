"""The page of a study: whole, well-formed, by itself, and safe whatever the records say."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, final

import pytest
from typer.testing import CliRunner

from flower_mcepl import Topology, simulate
from flower_mcepl.cli import app
from flower_mcepl.page.elements import Html, element
from flower_mcepl.page.report_page import report_page
from flower_mcepl.page.style import CSS
from flower_mcepl.plots.gallery import Gallery
from flower_mcepl.plots.subjects import subjects_of
from flower_mcepl.record import RunRecord
from flower_mcepl.studies import compare, read_study, run_study
from flower_mcepl.studies.sources import read_source
from flower_mcepl.studies.tables import cells, footnotes, titles
from tests.fleet import make_fleet
from tests.study_app import write_app, write_study

pytest.importorskip("matplotlib")

VOID = {"meta", "img", "br"}
LOADS = {"src", "href", "srcset", "data", "poster", "action", "background", "xlink:href"}
EVIL = '</title></pre><script>alert("1")</script><img src=x onerror=alert(2)>&amp;"\'\x00\x1b[31m $\\frac{'


@final
class Page(HTMLParser):
    """Reads a page and holds what a browser would get from it; anything out of balance fails."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.declarations: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_decl(self, decl: str) -> None:
        self.declarations.append(decl)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


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
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a study of three runs, done."""
    folder = tmp_path_factory.mktemp("study")
    head = "target = 0.2\n[[runs]]\nalgorithm = 'mcepl'\nseed = [1, 2]\n[[runs]]\nalgorithm = 'dsgd'\n"
    file = write_study(folder, write_app(folder, "page"), head)
    assert all(outcome.error is None for outcome in run_study(read_study(file)))
    return file


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    record = RunRecord.create(tmp_path_factory.mktemp("runs"), name="ring", config={"run_config": {"seed": 7}})
    simulate(make_fleet(3), Topology.ring(3), num_rounds=2, record=record)
    return record.path


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawing out, which takes most of the time."""
    monkeypatch.setattr("flower_mcepl.page.report_page.draw_gallery", lambda runs: Gallery(subjects_of(runs)[0]))


def report(source: Path, out: Path) -> str:
    result = CliRunner().invoke(app, ["report", str(source), "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.output == f"{out}\n"
    return out.read_text(encoding="utf-8")


def test_the_page_of_a_study_holds_everything(study: Path, tmp_path: Path) -> None:
    text = report(study, tmp_path / "new" / "page.html")
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

    source = read_source(study)
    comparison = compare(source.runs, target=0.2)
    assert page.text("th")[: len(titles(comparison))] == titles(comparison)
    for row in cells(comparison):
        for cell in row:
            assert cell in page.text("td")
    assert set(footnotes(comparison)) <= set(page.text("li"))
    assert "to 0.2" in page.text("th")

    assert study.read_text() in page.text("pre")
    assert json.loads((source.runs[0].path / "config.json").read_text())["versions"]["torch"] in page.text("td")
    assert [alt["alt"].partition(".")[0] for alt in page.all("img") if alt["alt"]] == [
        *("Accuracy by round", "Accuracy by bytes", "Spread over the agents", "Communication graph", "Who holds what"),
        *("Agreement of masks", "Density of filters"),
    ]
    assert {run.path.name for run in source.runs} <= set(page.text("summary"))
    assert "Data and masks: mcepl" in page.text("summary")
    assert "Who held what" in page.text("summary")
    assert "training / test examples of each class" in page.text("li")
    assert any("agents of dsgd hold no mask" in line for line in page.text("li"))


@pytest.mark.usefixtures("no_pictures")
def test_a_studys_folder_gives_the_same_page(study: Path) -> None:
    out = study.parent / "out"
    by_file, by_folder = Page(report_page(read_source(study))), Page(report_page(read_source(out)))
    assert by_folder.text("h1") == by_file.text("h1")
    assert sorted(by_folder.text("th")) == sorted(by_file.text("th"))
    assert {text for text in by_folder.text("td") if "|" not in text} == {
        text for text in by_file.text("td") if "|" not in text
    }
    assert study.read_text() in by_folder.text("pre")
    assert (out / "study.toml").read_text() == study.read_text()


@pytest.mark.usefixtures("no_pictures")
def test_runs_that_are_left_out_are_named(study: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(study.parent / "out", tmp_path / "out"))
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
    (table,) = [text for text in page.text("pre") if "personalised accuracy" in text]
    assert table.startswith("ring: finished, 3 agents, 2 rounds")
    (run,) = [details for details in page.all("details") if "open" in details]
    assert run == {"open": None}


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_was_killed_has_a_page(record: Path, tmp_path: Path) -> None:
    killed = Path(shutil.copytree(record, tmp_path / "killed"))
    (killed / "summary.json").unlink()
    page = Page(report_page(read_source(killed)))
    assert "The run is not finished; what follows is as far as it got." in page.text("p")


def test_hostile_records_stay_text(record: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(record, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config |= {"name": EVIL, "run_config": {EVIL: EVIL, "lone": "\ud800"}, "versions": {EVIL: EVIL}, "started": EVIL}
    config["agents"][0]["classes"] = [EVIL]
    (copy / "config.json").write_text(json.dumps(config))
    text = report(copy, tmp_path / "page.html")
    page = Page(text)
    assert_by_itself(page, text)
    shown = EVIL.replace("\x00", "�").replace("\x1b", "�")
    assert page.text("h1") == [shown]
    assert page.text("title") == [f"{shown} - flower-mcepl"]
    assert page.text("td").count(shown) == 4
    assert "\x00" not in text


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
    for bad in ("<img src='http://x/y.png'>", "<img src='a.png'>", "<script></script>", "<p onclick='x'></p>"):
        with pytest.raises(AssertionError):
            assert_by_itself(Page(bad), bad)


def test_the_style_is_for_light_dark_paper_and_wide_tables() -> None:
    for words in ("prefers-color-scheme: dark", "@media print", "overflow-x: auto", "color-scheme: light dark"):
        assert words in CSS
    assert CSS.count("{") == CSS.count("}")


def test_nothing_finished_is_told(study: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(re.sub("out = .*", f"out = '{tmp_path}/none'", study.read_text()))
    result: Any = CliRunner().invoke(app, ["report", str(file)])
    assert "no run of" in str(result.exception)


def test_help_teaches() -> None:
    assert "flower-mcepl report runs/ablation\n" in CliRunner().invoke(app, ["report", "--help"]).output
