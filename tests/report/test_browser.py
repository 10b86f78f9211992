"""The page of a study in a real browser: what only a browser knows, measured in
headless Chromium.

The page holds no script. A copy of it gets one, which measures when all is loaded and
writes what it found into an attribute of the document, or of the one around it;
Chromium prints that document.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.oracles.html_page import Page

pytest.importorskip("matplotlib")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,  # a page of a study takes as long to make as to look at
    pytest.mark.skipif(
        BROWSER is None, reason=f"no Chromium: none of {', '.join(NAMES)} is on PATH"
    ),
]

SWITCHES = (
    *(
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-dev-shm-usage",
    ),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files", "--dump-dom"),
)
WIDE, NARROW = 1280, 400
MEASURE = """<script>
addEventListener("load", () => {
  const root = document.documentElement, all = (what) => [...document.querySelectorAll(what)];
  const scrolls = (one) => ["auto", "scroll"].includes(getComputedStyle(one).overflowX);
  const boxed = ({parentElement: one}) => one && (scrolls(one) || boxed(one));
  const says = (one) => one.tagName + ": " + one.textContent.slice(0, 40);
  const ink = (picture) => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [64, 64];
    const context = canvas.getContext("2d");
    try { context.drawImage(picture, 0, 0, 64, 64); } catch { return 0; }
    const values = context.getImageData(0, 0, 64, 64).data;
    let dark = 0;
    for (let at = 0; at < values.length; at += 4)
      dark += values[at + 3] > 0 && values[at] + values[at + 1] < 480;
    return dark / (64 * 64);
  };
  const lines = (cell) => {
    const range = document.createRange();
    range.selectNodeContents(cell);
    return new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size;
  };
  const lastTitle = (box) => {
    box.scrollLeft = box.scrollWidth;
    const title = [...box.querySelectorAll("thead th")].pop().getBoundingClientRect();
    box.scrollLeft = 0;
    return title.right <= box.getBoundingClientRect().right + 1;
  };
  const measure = () => ({
    window: innerWidth, room: root.clientWidth, content: root.scrollWidth, loaded: performance
      .getEntriesByType("resource").map((one) => one.name),
    outside: all("body *").filter((one) => {
      const box = one.getBoundingClientRect();
      return box.width && !boxed(one) && (box.left < -0.5 || box.right > root.clientWidth + 0.5);
    }).map(says),
    broken: all("td.short, th.short:not(.number)").filter((cell) => lines(cell) > 1).map(says),
    pictures: [...document.images].map((one) => ({
      alt: one.alt.split(".")[0], width: one.naturalWidth, height: one.naturalHeight, ink: ink(one),
      shown: one.getBoundingClientRect().width,
    })),
    scrolling: all(".scroll").map((box) => box.scrollWidth > box.clientWidth),
    reachable: all(".scroll").map(lastTitle),
  });
  const closed = measure();
  all("details").forEach((one) => { one.open = true; });
  parent.document.documentElement.dataset.measured = JSON.stringify({ closed, open: measure() });
});
</script>
"""
WHITE = "<svg xmlns=%22http://www.w3.org/2000/svg%22 width=%22400%22 height=%22400%22/>"
FRAME = (
    "<!DOCTYPE html><html><body><iframe src='{}' style='width: {}px; height: 900px'></iframe>"
    "</body></html>"
)


def opened(text: str, folder: Path, *, width: int) -> tuple[Page, dict[str, Any]]:
    """The document after loading, and what was measured in it, with all details closed
    and with all open.

    Chromium makes no window below 500 px, so what is `NARROW` stands in a frame, which
    then is the document.
    """
    assert BROWSER is not None
    file, frame = folder / "page.html", folder / "frame.html"
    file.write_text(text.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    frame.write_text(FRAME.format(file.name, width), encoding="utf-8")
    start = frame if width == NARROW else file
    profile, size = f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 600)},900"
    command = [BROWSER, *SWITCHES, profile, size, start.as_uri()]
    result = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    page = Page(result.stdout)
    measured = page.tags[0][1].get("data-measured")
    assert measured, f"the script did not measure: {result.stderr[-2000:]}"
    return page, json.loads(measured)


def problems(found: dict[str, Any]) -> set[str]:
    """What is wrong with a page, wherever it was measured."""
    wrong = set()
    for state, facts in found.items():
        if facts["content"] > facts["room"]:
            wrong.add(f"{state}: {facts['content']} px of content in {facts['room']} px")
        wrong |= {f"{state}: sticks out: {what}" for what in facts["outside"]}
        wrong |= {f"{state}: broken in two: {what}" for what in facts["broken"]}
        wrong |= {f"{state}: loads {name}" for name in facts["loaded"]}
        wrong |= {
            f"{state}: no picture: {one['alt']}" for one in facts["pictures"] if one["width"] < 300
        }
        wrong |= {
            f"{state}: blank: {one['alt']}"
            for one in facts["pictures"]
            if not 0.002 < one["ink"] < 0.9
        }
    wrong |= {f"hidden: {one['alt']}" for one in found["open"]["pictures"] if one["shown"] < 100}
    return wrong


@pytest.fixture(scope="module")
def text(small_study_page: Path) -> str:
    return small_study_page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wide(text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any]]:
    return opened(text, tmp_path_factory.mktemp("wide"), width=WIDE)


@pytest.fixture(scope="module")
def narrow(text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return opened(text, tmp_path_factory.mktemp("narrow"), width=NARROW)[1]


def test_a_browser_holds_all_of_the_page(wide: tuple[Page, dict[str, Any]], text: str) -> None:
    page, written = wide[0], Page(text)
    for tag in ("h1", "h2", "h3", "th", "td", "pre", "summary", "figcaption", "li", "dt", "dd"):
        assert page.text(tag) == written.text(tag), tag
    for tag in ("table", "details", "figure"):
        assert len(page.all(tag)) == len(written.all(tag)) > 0, tag
    assert page.all("img") == written.all("img")


def test_pictures_decode_nothing_sticks_out_and_nothing_is_loaded(
    wide: tuple[Page, dict[str, Any]], narrow: dict[str, Any]
) -> None:
    for found, width in ((wide[1], WIDE), (narrow, NARROW)):
        assert found["open"]["window"] == width
        assert problems(found) == set()
        assert len(found["open"]["pictures"]) == len(wide[0].all("img"))


def test_tables_use_the_window_and_scroll_where_it_is_narrow(
    wide: tuple[Page, dict[str, Any]], narrow: dict[str, Any]
) -> None:
    assert not any(wide[1]["open"]["scrolling"])
    assert narrow["open"]["scrolling"][0]
    for found in (wide[1], narrow):
        assert len(found["open"]["scrolling"]) == len(wide[0].all("table"))
        assert all(found["open"]["reachable"])


@pytest.fixture(scope="module")
def broken(text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same page with every fault that is looked for."""
    for old, new in (
        (
            ".short { white-space: nowrap; }",
            "td.short { display: block; width: 1px; overflow-wrap: anywhere; }",
        ),
        ("iVBORw0KGgo", "iVBORw0KGgoAAAA"),
        (
            "</main>",
            "<p style='width: 900px'>too wide</p><p style='margin-left: -50px'>too far "
            "left</p></main>",
        ),
        ("</main>", f"<img alt='White.' width=300 src='data:image/svg+xml,{WHITE}'></main>"),
        ("</main>", "<img alt='Remote.' src='http://nowhere.invalid/x.png'></main>"),
        (
            "</main>",
            "<details><summary>more</summary><pre style='overflow: visible'>"
            + "x" * 300
            + "</pre></details></main>",
        ),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    return opened(text, tmp_path_factory.mktemp("broken"), width=NARROW)[1]


def test_the_check_can_fail(broken: dict[str, Any]) -> None:
    assert problems(broken) >= {
        "closed: sticks out: P: too wide",
        "closed: sticks out: P: too far left",
        "closed: loads http://nowhere.invalid/x.png",
        "closed: no picture: Accuracy by round",
        "closed: no picture: Remote",
        "closed: blank: White",
        "closed: broken in two: TD: dsgd",
    }


def test_the_check_opens_details(broken: dict[str, Any]) -> None:
    assert broken["open"]["content"] > broken["closed"]["content"] > broken["closed"]["room"]
