"""The counts of benchmarks/house.py, on packages small enough to count by eye."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "house.py"


@pytest.fixture(scope="module")
def house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def a_checkout(folder: Path, files: dict[str, str], readme: str = "") -> Path:
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / "flower_mcepl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "README.md").write_text(readme)
    return folder


TOWER = {
    "errors.py": "",
    "wire/__init__.py": "from flower_mcepl.wire.frame import Frame\n",
    "wire/frame.py": "from ..errors import WireError\nclass Frame: ...\n",
    "agents/__init__.py": "",
    "agents/agent.py": "def f():\n    from flower_mcepl.wire import Frame\n    import numpy\n",
    "__main__.py": "from flower_mcepl.agents import agent\n",
}


def test_a_tower_of_rooms_is_counted(house: ModuleType, tmp_path: Path) -> None:
    figures = house.measure(a_checkout(tmp_path, TOWER))
    assert (figures["rooms"], figures["files at the root"]) == (2, 1)
    # __main__ > agents > wire > errors; an import inside of a function counts
    assert (figures["arrows between rooms"], figures["floors of rooms"]) == (3, 4)
    assert figures["floors of modules"] == 5  # wire's face stands between agents and frame
    assert [figures[f"circles of {what}"] for what in ("rooms", "modules")] == [0, 0]
    assert figures["upward arrows"] == 0


def test_a_circle_is_one_floor_and_has_an_upward_arrow(house: ModuleType, tmp_path: Path) -> None:
    upwards = {**TOWER, "errors.py": "import flower_mcepl.agents.agent as late\n"}
    figures = house.measure(a_checkout(tmp_path, upwards))
    assert (figures["circles of rooms"], figures["upward arrows"]) == (1, 1)
    assert (figures["arrows between rooms"], figures["floors of rooms"]) == (4, 2)


@pytest.mark.parametrize(
    ("arrows", "upward"),
    [
        ("ab bc cd ad", 0),
        ("ab ba", 1),
        ("ab bc ca", 1),
        ("ab bc ca ba cb ac", 3),  # everyone imports everyone: half of the arrows
        ("ab ba cd dc bc", 2),
        ("ab bc ca ad da", 2),  # two circles through a, which no single arrow opens
        ("ab bc ca bd da", 1),  # two circles through ab
    ],
)
def test_the_fewest_upward_arrows_are_found(house: ModuleType, arrows: str, upward: int) -> None:
    graph: dict[str, set[str]] = {name: set() for name in "abcd"}
    for start, end in arrows.split():
        graph[start].add(end)
    assert house.upward_arrows(graph) == upward


def test_a_circle_too_large_to_try_is_not_counted_as_none(house: ModuleType) -> None:
    names = [str(number) for number in range(house.LARGEST_CIRCLE + 1)]
    ring = {name: {after} for name, after in zip(names, [*names[1:], names[0]], strict=True)}
    assert house.upward_arrows(ring) is None


def test_lines_of_docstrings_comments_and_code_have_limits_of_their_own(
    house: ModuleType, tmp_path: Path
) -> None:
    lines = [
        '"""A docstring of two lines, the second of which is empty but for its end.',
        f'{"d" * 89}"""',
        "",
        f"# {'c' * 87}",
        "# short",
        f"x = {'1' * 96}",
        f"y = {'1' * 97}",
        "z = 1",
        f't = "{"not a docstring".ljust(90)}"',
    ]
    figures = house.measure(a_checkout(tmp_path, {"errors.py": "\n".join(lines)}))
    assert figures["docstring lines over 88 columns, %"] == 50.0
    assert figures["comment lines over 88 columns, %"] == 50.0
    assert figures["code lines over 100 columns, %"] == 25.0


def test_functions_and_long_files_are_counted(house: ModuleType, tmp_path: Path) -> None:
    code = (
        "def f():\n    return 1\n\nclass C:\n    def g(self):\n        x = 1\n\n        return x\n"
    )
    files = {"errors.py": code, "long.py": "x = 1\n" * 351, "short.py": "x = 1\n" * 350}
    figures = house.measure(a_checkout(tmp_path, files))
    assert (figures["functions"], figures["median function, lines"]) == (2, 3.0)
    assert figures["files over 350 lines"] == 1


def test_the_readme_is_counted_without_its_code(house: ModuleType) -> None:
    code = "```bash\nnot counted `at` all\n| no | row |\n```\n"
    text = f"# Two words\n\n`one span` and\n\n{code}\n| a | b |\n|---|---|\n| c | `d` |\n"
    assert house.readme_counts(text) == {
        "README words": 9,
        "README code spans": 2,
        "README table rows": 3,
    }


def test_a_folder_without_the_package_is_refused(house: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="name a checkout of the project"):
        house.measure(tmp_path)


def test_the_command_prints_two_checkouts_side_by_side(
    house: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = a_checkout(tmp_path / "before", TOWER, "one two three")
    monkeypatch.setattr(house, "HERE", a_checkout(tmp_path / "after", {"errors.py": ""}))

    def printed(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, str(other)])
        house.main()
        return capsys.readouterr().out

    columns = json.loads(printed("--json"))
    assert list(columns) == ["before", "here"]
    assert [column["README words"] for column in columns.values()] == [3, 0]
    head, rooms, *_, chain = printed().splitlines()
    assert head.split() == ["before", "here"]
    assert rooms.split() == ["rooms", "2", "0"]
    assert chain.startswith("longest chain of rooms: ")


def test_the_readme_of_this_project_is_short(house: ModuleType) -> None:
    figures = house.readme_counts((ROOT / "README.md").read_text(encoding="utf-8"))
    assert figures["README words"] <= 500
    assert figures["README code spans"] <= 30
    assert figures["README table rows"] <= 10
