"""The rooms of the house, held by reading the imports, and the freedom from heavy
packages, held by a fresh process.
"""

import ast
import functools
import graphlib
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import flower_mcepl
from flower_mcepl import _LAZY

# Each room, and the rooms that it may import from.
ROOMS = {
    "errors": "",
    "models": "errors",
    "streams": "errors",
    "config": "errors",
    "files": "errors",
    "terminal": "",
    "masks": "errors models streams config",
    "data": "errors streams config files",
    "topology": "errors streams config",
    "wire": "errors config",
    "agents": "errors models streams config files masks data wire",
    "personal": "errors models streams config files masks agents record wire",
    "exchange": "errors config files wire topology agents",
    "messages": "errors agents exchange",
    "record": "errors files",
    "runs": "errors streams config files data topology agents exchange record terminal",
    "clients": "errors streams config files data masks agents personal record exchange messages "
    "runs",
    "strategies": "errors config files masks topology agents exchange messages record runs report",
    "report": "errors streams config record masks agents terminal",
    "launch": "errors files terminal",
    "studies": "errors streams config files record report agents runs clients launch",
    "doctor": "errors streams config record topology agents personal exchange runs launch studies",
    "cli": "errors config wire agents personal record report launch studies doctor terminal",
    "__init__": "errors models masks data topology wire agents personal record runs",
    "__main__": "cli",
}

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flower_mcepl"
SIDES = ("strategies", "clients")
# they run whole apps, so they may use Flower's client side, but load it only for a run
STUDIES = "studies"
DATASETS = ("flwr_datasets", "datasets")
HEAVY = ("flwr", "ray", "torchvision", "matplotlib", "rich", "pandas", "datasets")
FLOWERS_DOORS = (
    "flwr.app",
    "flwr.clientapp",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
    "flwr.simulation",
)
EVERYWHERE, AT_THE_TOP = False, True


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (PACKAGE / room).rglob("*.py"))


CORE = [
    path for path in sources(".") if path.relative_to(PACKAGE).parts[0] not in (*SIDES, STUDIES)
]
ALL = sources(".")
COMMANDS = sources("cli")  # the command line alone loads what it prints with


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, when: bool = EVERYWHERE, source: str | None = None) -> Iterable[str]:
    """Names of the modules that a file imports: everywhere in it, or only as it is
    itself imported.
    """
    return read_imports(path, when) if source is None else parsed_imports(path, when, source)


@functools.cache
def read_imports(path: Path, when: bool) -> tuple[str, ...]:
    return tuple(parsed_imports(path, when, path.read_text()))


def parsed_imports(path: Path, when: bool, source: str) -> Iterator[str]:
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = (
                path.relative_to(ROOT).parent.parts[: -node.level + 1 or None] if node.level else ()
            )
            module = ".".join([*package, node.module] if node.module else package)
            if (
                module != "flower_mcepl"
            ):  # its face and its rooms are told apart by what comes from it
                yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif not (when is AT_THE_TOP and runs_later(node)):
            children = ast.iter_child_nodes(node)
            pending.extend(child for child in children if not isinstance(child, ast.expr))


def runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def belongs_to(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


SAMPLE = """
import a.b as c
from d import e
from . import near
from ..far import away
if True:
    import f
if TYPE_CHECKING:
    import g
def h():
    import i
class J:
    import k
"""


def test_reading_imports_sees_all_their_forms() -> None:
    path = PACKAGE / "room" / "sample.py"
    at_the_top = {"a.b", "d", "d.e", "f", "k"}
    at_the_top |= {
        "flower_mcepl.room",
        "flower_mcepl.room.near",
        "flower_mcepl.far",
        "flower_mcepl.far.away",
    }
    assert set(imports(path, source=SAMPLE, when=AT_THE_TOP)) == at_the_top
    assert set(imports(path, source=SAMPLE)) == at_the_top | {"g", "i"}


def room_of(path: Path) -> str:
    """Room of a file of the package: its first folder, or itself where it stands at the
    root.
    """
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(path: Path, *, source: str | None = None) -> set[str]:
    """Rooms that a file imports from, its own left out; the package's face counts as
    one.
    """
    inside = [name.split(".") for name in imports(path, source=source)]
    inside = [[*parts, ""] for parts in inside if parts[0] == "flower_mcepl"]
    return {parts[1] if parts[1] in ROOMS else "__init__" for parts in inside} - {room_of(path)}


def test_every_room_stands_in_the_table_and_the_table_names_no_other() -> None:
    assert {room_of(path) for path in ALL} == set(ROOMS)
    assert {room for allowed in ROOMS.values() for room in allowed.split()} <= set(ROOMS)


def test_the_rooms_stand_on_each_other_without_a_circle() -> None:
    order = graphlib.TopologicalSorter({room: allowed.split() for room, allowed in ROOMS.items()})
    assert len(list(order.static_order())) == len(ROOMS)


def test_a_file_imports_only_from_the_rooms_that_the_table_names() -> None:
    others = {
        module_name(path): rooms_imported(path) - {*ROOMS[room_of(path)].split()} for path in ALL
    }
    assert {module: rooms for module, rooms in others.items() if rooms} == {}


def test_the_check_of_rooms_can_fail() -> None:
    path = PACKAGE / "wire" / "sample.py"
    upwards = (
        "def f():\n    from flower_mcepl.agents import Agent\n    import flower_mcepl.runs.book"
    )
    assert rooms_imported(path, source=upwards) == {"agents", "runs"}
    assert rooms_imported(path, source="from flower_mcepl import errors, simulate") == {
        "errors",
        "__init__",
    }
    assert rooms_imported(path, source="import flower_mcepl") == {"__init__"}
    assert rooms_imported(path, source="from ..masks import formulas") == {"masks"}
    assert rooms_imported(path, source="from flower_mcepl.wire.layout import MAGIC") == set()


def forbidden_in(path: Path) -> tuple[str, ...]:
    """Packages that a file of the core must not import anywhere."""
    # by flwr-datasets, which it loads only then
    divides = path == PACKAGE / "data" / "partition.py"
    sides = tuple(f"flower_mcepl.{side}" for side in SIDES)
    # a hub's networks, where a run names one of them
    fetches = path == PACKAGE / "masks" / "pretrained.py"
    vision = () if fetches else ("torchvision",)
    return ("flwr", "ray", *vision, *sides, *(() if divides else DATASETS))


def late_in(path: Path) -> tuple[str, ...]:
    """Packages that a file of the core must not import as it is itself imported."""
    printing = () if path in COMMANDS else ("rich", "typer")
    return ("matplotlib", "torchvision", "timm", "sklearn", "pandas", *DATASETS, *printing)


def strangers(paths: list[Path], is_strange: Callable[[str], bool]) -> list[tuple[str, str]]:
    """Files with the names that they import and should not."""
    assert len(paths) > 150
    names = [(path.relative_to(ROOT).as_posix(), name) for path in paths for name in imports(path)]
    return [(place, name) for place, name in names if is_strange(name)]


def test_the_core_knows_neither_flower_nor_ray_nor_the_sides() -> None:
    for path in CORE:
        for when, packages in ((EVERYWHERE, forbidden_in(path)), (AT_THE_TOP, late_in(path))):
            for name in imports(path, when=when):
                assert not [package for package in packages if belongs_to(name, package)], path


def test_flower_is_entered_by_its_public_doors() -> None:
    def is_private(name: str) -> bool:
        doors = {name, name.rpartition(".")[0]} & {*FLOWERS_DOORS}
        return belongs_to(name, "flwr") and not doors

    assert is_private("flwr.common.serde")
    assert strangers([*ALL, *sorted((ROOT / "examples").rglob("*.py"))], is_private) == []


def test_nothing_imports_through_the_top_level_doors() -> None:
    folders = ("flower_mcepl", "tests", "examples", "benchmarks")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert strangers(paths, lambda name: name.partition(".")[0] in SIDES) == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a source distribution has no links")
@pytest.mark.parametrize("side", SIDES)
def test_the_top_level_doors_are_relative_links(side: str) -> None:
    door = ROOT / side
    assert door.is_symlink()
    assert not door.readlink().is_absolute()
    assert door.resolve() == (PACKAGE / side).resolve()


# --- freedom, in a process of its own ---


def loaded_after(*statements: str | tuple[str, ...]) -> list[set[str]]:
    """The modules that a fresh interpreter holds after each statement, in turn.

    A tuple is played by a twin of it, and leaves no trace in those that follow.
    """

    def noting(statement: str | tuple[str, ...]) -> str:
        if isinstance(statement, str):
            return f"{statement}\nprint('loaded', *sys.modules, flush=True)\n"
        inside = textwrap.indent("".join(map(noting, statement)), "    ")
        return f"if not os.fork():\n{inside}    os._exit(0)\nos.wait()\n"

    code = "import os, sys\n" + "".join(map(noting, statements))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    lines = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("loaded ")]
    assert len(lines) == code.count("print('loaded'")
    return [set(line) for line in lines]


@pytest.fixture(scope="module")
def from_face_to_core() -> list[set[str]]:
    """What is loaded with the package, its errors, its rooms, its names, its core."""
    one_by_one = "; ".join(f"assert flower_mcepl.{room}" for room in ("topology", "wire", "runs"))
    core = [path for path in CORE if path.name != "__main__.py" and path not in COMMANDS]
    everything = "\n".join(f"import {module_name(path)}" for path in core)
    assert "import flower_mcepl.runs.simulation\n" in everything
    return loaded_after(
        "import flower_mcepl; flower_mcepl.__version__",
        "from flower_mcepl import ConfigError, RunRecord, read_run",
        f"import flower_mcepl; {one_by_one}",
        "from flower_mcepl import *; simulate, MceplAgent",
        everything,
    )


def test_the_package_itself_loads_nothing_but_its_errors(
    from_face_to_core: list[set[str]],
) -> None:
    heavy = [modules & {*HEAVY, "numpy", "torch"} for modules in from_face_to_core[:4]]
    assert heavy == [set(), set(), {"numpy", "torch"}, {"numpy", "torch"}]


def test_the_core_loads_nothing_heavy(from_face_to_core: list[set[str]]) -> None:
    assert from_face_to_core[-1] & {*HEAVY, "typer"} == set()


def test_rooms_around_runs_load_nothing_heavy_before_a_run_needs_it() -> None:
    """The command line last: it loads what it prints with."""
    rooms = ["record", "report", "studies", "launch", "doctor", "cli.app"]
    numbers = {*HEAVY, "torch", "numpy", "networkx", "tensorboard"}
    *loaded, with_commands = loaded_after(*(f"import flower_mcepl.{room}" for room in rooms))
    assert [modules & numbers for modules in loaded] == [set()] * 5
    assert with_commands & numbers <= {"rich"}


@pytest.mark.slow
def test_a_relay_loads_nothing_that_starts_runs(on_both_sides: list[set[str]]) -> None:
    rooms = {f"flower_mcepl.{room}" for room in ("studies", "launch", "doctor", "cli", "clients")}
    _, relay, study, *_ = on_both_sides
    assert relay & rooms == set()
    assert study & rooms >= {"flower_mcepl.launch"}


def test_the_check_for_heavy_packages_can_fail() -> None:
    twin, *after_it = loaded_after(("import rich.table",), "pass", "import rich.text")
    assert [modules & {*HEAVY} for modules in (twin, *after_it)] == [{"rich"}, set(), {"rich"}]


def test_third_party_imports_are_declared() -> None:
    """What the core and both sides import as they load must come with the plain
    package, and nothing in vain.
    """
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = {
            re.split(r"[\[<>=~!; ]", line)[0]
            for line in tomllib.load(file)["project"]["dependencies"]
        }
    ours = set(sys.stdlib_module_names) | {"flower_mcepl"}
    at_the_top = {
        name.partition(".")[0] for path in ALL for name in imports(path, when=AT_THE_TOP)
    } - ours
    anywhere = {name.partition(".")[0] for path in ALL for name in imports(path)}
    assert at_the_top <= declared <= anywhere


@pytest.fixture(scope="module")
def on_both_sides() -> list[set[str]]:
    """What is loaded with Flower itself; with the strategies, and studies after them,
    or with the clients, and after a round.
    """
    one_round = """
from tests.fleet.flower_messages import a_context, a_message, be_a_node, the_app
be_a_node()
app, context = the_app(), a_context()
app(a_message(1), context)
app(a_message(2, neighbors=(1,), evaluate=True), context)
"""
    of_flower = "import torch, flwr.app, flwr.clientapp"
    relay = ("import flower_mcepl.strategies", "import flower_mcepl.studies")
    return loaded_after(of_flower, relay, "import flower_mcepl.clients", one_round)


def test_a_device_loads_only_what_a_message_needs(on_both_sides: list[set[str]]) -> None:
    """On a device every message is a process: what it loads is paid in every round."""
    of_flower, _, _, with_clients, _ = on_both_sides
    packages = {name.partition(".")[0] for name in with_clients - of_flower}
    packages = {name for name in packages if not name.startswith("_")}
    assert packages - set(sys.stdlib_module_names) <= {
        "flower_mcepl",
        "constriction",
        "jaxtyping",
        "numpy",
        "safetensors",
        "torch",
    }


def test_a_device_loads_nothing_heavy_when_it_plays_a_round(
    on_both_sides: list[set[str]],
) -> None:
    rooms = tuple(
        f"flower_mcepl.{room}"
        for room in ("strategies", "studies", "report", "doctor", "cli", "launch")
    )
    of_flower, *_, after_a_round = on_both_sides
    heavy = (*HEAVY, "networkx", "sklearn", "datasets", "flwr_datasets", "sympy", "torch._dynamo")
    assert after_a_round & {*heavy, *rooms} <= (of_flower & {*HEAVY}) | {"flwr"}


# --- names ---


def test_public_names_are_those_that_are_visible() -> None:
    visible = {
        name
        for name, value in vars(flower_mcepl).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert visible <= {*flower_mcepl.__all__, "TYPE_CHECKING"}
    assert dir(flower_mcepl) == sorted([*flower_mcepl.__all__, "__version__"])
    assert list(flower_mcepl.__all__) == sorted(flower_mcepl.__all__)
    assert set(flower_mcepl.__all__) >= {
        "MaskedModel",
        "topk_mask",
        "aggregate_scores",
        "neighbor_step",
        "group_lasso",
        "MceplAgent",
        "Topology",
        "simulate",
        "encode_frame",
        "decode_frame",
        "FlowerMceplError",
    }


def test_public_names_are_loaded_when_they_are_asked_for() -> None:
    """The names that a type checker sees are those that come, each from the same
    module.
    """
    face = PACKAGE / "__init__.py"
    seen = set(imports(face)) - set(imports(face, when=AT_THE_TOP))
    lazy = {f"flower_mcepl.{room}.{name}" for room, names in _LAZY.items() for name in names}
    assert {name for name in seen if name.rpartition(".")[2] in flower_mcepl.__all__} == lazy
    for name in flower_mcepl.__all__:
        assert getattr(flower_mcepl, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Topologie'"):
        _ = flower_mcepl.Topologie


def test_the_version_is_that_of_the_project() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert flower_mcepl.__version__ == tomllib.load(file)["project"]["version"]


def test_every_error_is_public_and_drawn_in_the_tree() -> None:
    from flower_mcepl import errors

    names = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert names <= set(flower_mcepl.__all__)
    assert all(issubclass(getattr(errors, name), errors.FlowerMceplError) for name in names)
    assert set(re.findall(r"\b\w+Error\b", errors.__doc__ or "")) == names


def test_modules_have_names_that_say_something() -> None:
    assert not {path.stem for path in ALL} & {"utils", "util", "common", "helpers", "base", "misc"}
