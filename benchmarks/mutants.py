"""Mutants: small faults put into the code one at a time, and whether a test notices.

::

    python benchmarks/mutants.py flower_mcepl/exchange flower_mcepl/masks --sample 100

First the fast tests run once under coverage, which tells for every line which tests go
over it (kept in ``--map``; ``--fresh`` makes it anew). Then every mutant is tried
against those tests alone, in a process of its own. A mutant is killed when one of them
fails or takes too long. The table names those that survive: each is a test to write, or
a line without which nothing changes. Needs the packages of the extra ``dev``.

Of 95 mutants of ``exchange runs agents masks`` (seed 1) 79 were killed at first, and 90
with more than the 30 quickest tests and with the tests that the others asked for. In
the last five nothing changes that a test could see:

- ``runs/resumption.py``, ``_synced_size``: a file that is missing has no bytes; a
  checkpoint follows a round, with which all files of the record begin.
- ``runs/resumption.py``, ``_last_answered``: a record without rounds; one that was
  resumed has some.
- ``masks/sparsity.py``, ``to_sparse``: ``check_invariants``; what it checks is right.
- ``agents/array_layout.py``, ``_taken``: ``copy=False``; a copy is the same array.
- ``agents/fedpm.py``, ``_draw``: ``<`` or ``<=``; a draw equals θ once in 2^24.
"""

import argparse
import ast
import collections
import copy
import importlib.machinery
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
# test functions tried against a mutant, the quickest first; and those after them, where
# it is still alive
QUICKEST, MOST_TESTS = 30, 300
TIMEOUT, TIMEOUT_A_TEST = 60, 4  # seconds; a mutant that takes longer is killed
SWAPS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.FloorDiv: ast.Mult},
}


@dataclass(frozen=True)
class Mutant:
    """One fault: another expression or statement in place of one node."""

    path: str  # of the file, relative to the root
    line: int
    scope: range  # lines of the innermost function or class that holds it
    before: str
    after: str
    source: str  # the whole file with the fault


# --- making them ---


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Mutants of a file; error messages, annotations and docstrings are left alone."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    place = str(path.relative_to(ROOT))
    for node in changeable(tree):
        for other in changes(node):
            before, after = ast.unparse(node), ast.unparse(other)
            if before != after:
                source = replaced(text, node, after)
                scope = scope_of(tree, node.lineno)
                yield Mutant(place, node.lineno, scope, before, after, source)


def scope_of(tree: ast.Module, line: int) -> range:
    """Lines of the innermost function or class around a line, else of the module."""
    scopes = [
        range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    around = [scope for scope in scopes if line in scope]
    return min(around, key=len) if around else range(1, 10**6)


def changeable(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Nodes whose change a test could notice, outermost first."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.expr | ast.stmt):
            yield node
        if isinstance(node, ast.FunctionDef):
            pending += [*node.body, *node.args.defaults, *filter(None, node.args.kw_defaults)]
        elif isinstance(node, ast.ClassDef):
            pending += node.body
        elif isinstance(node, ast.AnnAssign):
            pending += [node.value] if node.value else []
        elif not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("check", "corrupt")):
            pending += ast.iter_child_nodes(node)
        else:
            pending += node.args[:1]  # the rest is the text of an error


def changes(node: ast.expr | ast.stmt) -> Iterator[ast.AST]:
    """What may stand in place of a node."""
    other = copy.deepcopy(node)
    if isinstance(other, ast.Compare) and type(other.ops[0]) in SWAPS:
        other.ops[0] = SWAPS[type(other.ops[0])]()
        yield other
    elif isinstance(other, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(other.op) in SWAPS:
        other.op = SWAPS[type(other.op)]()
        yield other
    elif isinstance(other, ast.UnaryOp) and isinstance(other.op, ast.Not):
        yield other.operand
    elif isinstance(other, ast.Constant) and isinstance(other.value, bool):
        yield ast.Constant(not other.value)
    elif isinstance(other, ast.Constant) and isinstance(other.value, int):
        yield ast.Constant(other.value + 1)
    elif isinstance(other, ast.IfExp):
        yield other.body
        yield other.orelse
    elif isinstance(other, ast.Expr) and isinstance(other.value, ast.Call):
        yield ast.Pass()
    elif isinstance(other, ast.Assign) and isinstance(other.targets[0], ast.Attribute):
        if not (isinstance(other.value, ast.Name | ast.Constant)):
            yield ast.Pass()


def replaced(text: str, node: ast.expr | ast.stmt, after: str) -> str:
    """Source in which other code stands in place of a node."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    lines = text.encode().split(b"\n")
    head = lines[node.lineno - 1][: node.col_offset]
    tail = lines[node.end_lineno - 1][node.end_col_offset :]
    inside = after if isinstance(node, ast.stmt) else f"({after})"
    lines[node.lineno - 1 : node.end_lineno] = [head + inside.encode() + tail]
    return b"\n".join(lines).decode()


# --- which tests go over a line ---


def line_map(file: Path, tests: list[str], *, fresh: bool) -> dict[str, dict[int, list[str]]]:
    """Test functions by file and line, the quickest first."""
    if fresh or not file.exists():
        data, times = file.with_suffix(".coverage"), file.with_suffix(".xml")
        code = (
            "import coverage, pytest, sys; c = coverage.Coverage(data_file=sys.argv[1], "
            "config_file=False, source=['flower_mcepl']); c.set_option('run:dynamic_context', "
            "'test_function'); c.start(); code = pytest.main(sys.argv[2:]); c.stop(); c.save(); "
            "sys.exit(code)"
        )
        options = ["-q", "-n", "0", f"--junitxml={times}", *tests]
        done = subprocess.run(
            [sys.executable, "-c", code, str(data), *options], cwd=ROOT, check=False
        )
        if done.returncode:
            sys.exit("the tests must pass before mutants are tried")
        file.write_text(json.dumps(read_map(data, times)), encoding="utf-8")
    stored = json.loads(file.read_text(encoding="utf-8"))
    return {path: {int(line): ids for line, ids in lines.items()} for path, lines in stored.items()}


def read_map(data: Path, times: Path) -> dict[str, dict[int, list[str]]]:
    """Line map from a coverage file and the durations in a JUnit file."""
    import xml.etree.ElementTree as ElementTree

    import coverage

    seconds: collections.Counter[str] = collections.Counter()
    for case in ElementTree.parse(times).getroot().iter("testcase"):
        name = f"{case.get('classname')}.{str(case.get('name')).partition('[')[0]}"
        seconds[name] += float(case.get("time", 0))
    found = coverage.CoverageData(str(data))
    found.read()
    result: dict[str, dict[int, list[str]]] = {}
    for path in found.measured_files():
        lines = found.contexts_by_lineno(path)
        result[str(Path(path).relative_to(ROOT))] = {
            # what a library calls `test_...` is no test: pytest would refuse its name
            line: [node_id(name) for name in sorted({*names} & {*seconds}, key=seconds.__getitem__)]
            for line, names in lines.items()
        }
    return result


def node_id(context: str) -> str:
    """Pytest's id of a function that coverage calls ``tests.wire.test_x.test_y``."""
    module, _, function = context.rpartition(".")
    return f"{module.replace('.', '/')}.py::{function}"


def tests_for(mutant: Mutant, lines: dict[int, list[str]]) -> list[str]:
    """Tests that go over a line; for one that runs at import, over its scope."""
    if own := lines.get(mutant.line):
        return own
    inside = [name for line in mutant.scope for name in lines.get(line, ())]
    return list(dict.fromkeys(inside))


# --- trying one ---


def is_killed(mutant: Mutant, tests: list[str]) -> bool:
    """Whether one of the tests notices; each mutant has a forked process of its own."""
    child = os.fork()
    if child == 0:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(run_with(mutant, tests))
    deadline = time.monotonic() + TIMEOUT + TIMEOUT_A_TEST * len(tests)
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def refuse_what_kills_anything(
    mutants: list[Mutant], lines: dict[str, dict[int, list[str]]]
) -> None:
    """Exit where tests fail on the code as it is: they would "kill" every mutant."""
    for mutant in mutants:
        if own := tests_for(mutant, lines.get(mutant.path, {})):
            source = (ROOT / mutant.path).read_text(encoding="utf-8")
            if is_killed(replace(mutant, source=source), own[:QUICKEST]):
                sys.exit(f"without a fault, one of these must not fail: {own[:QUICKEST]}")
            return


def run_with(mutant: Mutant, tests: list[str]) -> int:
    """Run tests on code in which the mutant stands in place of its file."""
    import pytest

    place = str(ROOT / mutant.path)
    loader = importlib.machinery.SourceFileLoader
    get_data, path_stats = loader.get_data, loader.path_stats

    def other_data(self: importlib.machinery.SourceFileLoader, path: str) -> bytes:
        return mutant.source.encode() if str(path) == place else get_data(self, path)

    def no_bytecode(self: importlib.machinery.SourceFileLoader, path: str) -> object:
        if str(path) == place:
            raise OSError("its bytecode is of the code without the fault")
        return path_stats(self, path)

    loader.get_data, loader.path_stats = other_data, no_bytecode  # type: ignore[assignment]
    try:
        return int(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]))
    except BaseException:  # a module that can no longer be imported, or a SystemExit
        return 1


def main() -> None:
    """Print what became of every mutant, and the share that was killed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("places", nargs="+", type=Path, help="files or folders of the package")
    parser.add_argument("--sample", type=int, default=100, help="mutants to try (default: 100)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (default: 1)")
    parser.add_argument(
        "--tests", nargs="*", default=["tests"], help="tests to map (default: all fast ones)"
    )
    parser.add_argument("--map", type=Path, default=ROOT / "build" / "mutants.json")
    parser.add_argument("--fresh", action="store_true", help="make the map anew")
    arguments = parser.parse_args()
    arguments.map.parent.mkdir(parents=True, exist_ok=True)
    tests = line_map(arguments.map.absolute(), arguments.tests, fresh=arguments.fresh)
    files = [f for p in arguments.places for f in ([p] if p.is_file() else sorted(p.rglob("*.py")))]
    every = [mutant for file in files for mutant in mutants_of(file.absolute())]
    chosen = random.Random(arguments.seed).sample(every, min(arguments.sample, len(every)))
    import torch  # so that no child loads it anew

    torch.set_num_threads(1)
    refuse_what_kills_anything(chosen, tests)
    survivors = []
    for number, mutant in enumerate(chosen, start=1):
        own = tests_for(mutant, tests.get(mutant.path, {}))
        parts = filter(None, (own[:QUICKEST], own[QUICKEST:MOST_TESTS]))
        killed = any(is_killed(mutant, part) for part in parts)
        survivors += [] if killed else [mutant]
        state = "killed" if killed else "SURVIVED" if own else "SURVIVED (no test goes here)"
        print(
            f"{number}/{len(chosen)} {state}: {mutant.path}:{mutant.line}  {mutant.before}  ->  "
            f"{mutant.after}",
            flush=True,
        )
    share = 1 - len(survivors) / len(chosen)
    print(f"\n{len(chosen)} of {len(every)} mutants tried, {share:.1%} killed; survivors:")
    for mutant in sorted(survivors, key=lambda m: (m.path, m.line)):
        print(f"  {mutant.path}:{mutant.line}  {mutant.before}  ->  {mutant.after}")


if __name__ == "__main__":
    main()
