"""Count how the package is built: rooms, imports, widths, README.

    python benchmarks/house.py                  # this checkout
    python benchmarks/house.py OTHER_CHECKOUT   # the other one beside this one
    python benchmarks/house.py --json

Nothing is imported: everything is read from the files. A *room* is a folder or a file
at the root of the package. An *arrow* goes from a room to each room that it imports
from, imports inside of functions included. A *floor* is a step of the longest chain of
arrows, a circle counted as one step. An arrow is *upward* if it has to go before the
rest has no circle (the fewest such arrows are counted).
"""

import argparse
import ast
import json
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = "flower_mcepl"
HERE = Path(__file__).resolve().parents[1]
DOC_WIDTH, CODE_WIDTH, FILE_LINES = 88, 100, 350
LARGEST_CIRCLE = 16  # rooms; what `upward_arrows` does doubles with each one more
FACES = ("__init__", "__main__")  # files that every package has at its root

Graph = dict[str, set[str]]  # name: the names that it imports from


def measure(checkout: Path) -> dict[str, Any]:
    """Count everything in one checkout."""
    files = {path: path.read_text(encoding="utf-8") for path in sources(checkout)}
    if not files:
        raise SystemExit(f"{checkout} has no folder {PACKAGE}; name a checkout of the project.")
    top = checkout / PACKAGE
    trees = {path: ast.parse(text) for path, text in files.items()}
    rooms, modules = graphs(checkout, trees)
    return {
        "rooms": sum(path.is_dir() for path in {top / p.relative_to(top).parts[0] for p in files}),
        "files at the root": sum(p.parent == top and p.stem not in FACES for p in files),
        "arrows between rooms": sum(map(len, rooms.values())),
        "upward arrows": upward_arrows(rooms),
        "circles of rooms": len(circles(rooms)),
        "floors of rooms": len(longest_chain(rooms)),
        "floors of modules": len(longest_chain(modules)),
        "circles of modules": len(circles(modules)),
        **widths(files, trees),
        **functions(trees),
        f"files over {FILE_LINES} lines": sum(
            len(text.splitlines()) > FILE_LINES for text in files.values()
        ),
        **readme_counts((checkout / "README.md").read_text(encoding="utf-8")),
    }


def sources(checkout: Path) -> list[Path]:
    """The package's files."""
    return sorted((checkout / PACKAGE).rglob("*.py"))


# --- imports ---


def graphs(checkout: Path, trees: dict[Path, ast.Module]) -> tuple[Graph, Graph]:
    """Who imports from whom: rooms, and modules."""
    names = {module_name(path.relative_to(checkout)): path for path in trees}
    modules: Graph = {name: set() for name in names}
    for name, path in names.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        for target in imports(trees[path], package):
            if module := nearest_module(target, names):
                modules[name].add(module)
        modules[name].discard(name)
    rooms: Graph = {room_of(name): set() for name in names}
    for name, targets in modules.items():
        rooms[room_of(name)] |= {room_of(target) for target in targets} - {room_of(name)}
    return rooms, modules


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def nearest_module(name: str, modules: Iterable[str]) -> str:
    """The longest beginning of a dotted name that is a module; "" if there is none."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Dotted names that a module of ``package`` imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -node.level + 1 or None] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


# --- graphs ---


def components(graph: Graph) -> list[list[str]]:
    """Strongly connected components, each after those it points to (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    done: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            place = stack.index(node)
            done.append(sorted(stack[place:]))
            del stack[place:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return done


def circles(graph: Graph) -> list[list[str]]:
    """Groups of names that import each other, directly or through others."""
    return [group for group in components(graph) if len(group) > 1]


def longest_chain(graph: Graph) -> list[list[str]]:
    """The longest chain of components from the top to the ground."""
    chains: dict[str, list[list[str]]] = {}
    for group in components(graph):  # what it stands on comes before it
        below = {target for node in group for target in graph[node]} - set(group)
        longest = max((chains[target] for target in sorted(below)), key=len, default=[])
        chains |= {node: [group, *longest] for node in group}
    return max(chains.values(), key=len, default=[])


def upward_arrows(graph: Graph) -> int | None:
    """The fewest arrows without which no circle is left; None if one is too large.

    Dynamic programming over sets of names that already have a place, lowest first: a
    name that takes the next place pays for each of its arrows to one that has none yet.
    """
    total = 0
    for group in circles(graph):
        if len(group) > LARGEST_CIRCLE:
            return None
        arrows = [sum(1 << group.index(t) for t in graph[node] if t in group) for node in group]
        cost = [0] + [len(group) ** 2] * (2 ** len(group) - 1)
        for placed in range(len(cost)):
            for place, targets in enumerate(arrows):
                if not placed >> place & 1:
                    after = placed | 1 << place
                    cost[after] = min(cost[after], cost[placed] + (targets & ~after).bit_count())
        total += cost[-1]
    return total


# --- lines ---


def widths(files: dict[Path, str], trees: dict[Path, ast.Module]) -> dict[str, Any]:
    """Shares of lines that are too wide, in percent; empty lines do not count."""
    docs: list[int] = []
    comments: list[int] = []
    code: list[int] = []
    for path, text in files.items():
        in_docs = docstring_lines(trees[path])
        for number, line in enumerate(text.splitlines(), start=1):
            kind = docs if number in in_docs else comments if is_comment(line) else code
            if line.strip():
                kind.append(len(line))
    return {
        f"docstring lines over {DOC_WIDTH} columns, %": share_over(docs, DOC_WIDTH),
        f"comment lines over {DOC_WIDTH} columns, %": share_over(comments, DOC_WIDTH),
        f"code lines over {CODE_WIDTH} columns, %": share_over(code, CODE_WIDTH),
    }


def is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def share_over(lengths: list[int], limit: int) -> float:
    over = sum(length > limit for length in lengths)
    return round(100 * over / len(lengths), 1) if lengths else 0.0


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that docstrings take up."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if first is not None and ast.get_docstring(node, clean=False) is not None:
                lines |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def functions(trees: dict[Path, ast.Module]) -> dict[str, Any]:
    """Number of functions, and their median length from ``def`` to the last line."""
    lengths = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return {
        "functions": len(lengths),
        "median function, lines": statistics.median(lengths) if lengths else 0,
    }


# --- README ---


def readme_counts(text: str) -> dict[str, int]:
    """Words and code spans outside of code blocks, and rows of tables."""
    prose = re.sub(r"^(`{3,}|~{3,}).*?^\1[ \t]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return {
        "README words": len(re.findall(r"\w+", prose)),
        "README code spans": len(re.findall(r"`[^`\n]+`", prose)),
        "README table rows": sum(line.lstrip().startswith("|") for line in prose.splitlines()),
    }


# --- output ---


def table(columns: dict[str, dict[str, Any]]) -> str:
    """The figures as text, one column a checkout."""
    names = list(next(iter(columns.values())))
    rows = [["", *columns], *([name, *(str(c[name]) for c in columns.values())] for name in names)]
    width = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])]) for row in rows
    )


def details(checkout: Path) -> str:
    """What is behind the figures: the longest chain of rooms, circles, long files."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources(checkout)}
    rooms, modules = graphs(checkout, trees)
    lines = ["longest chain of rooms: " + " > ".join("+".join(g) for g in longest_chain(rooms))]
    for group in (*circles(rooms), *circles(modules)):
        lines.append("circle: " + " ".join(group))
    for path in trees:
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > FILE_LINES:
            lines.append(f"{length} lines: {path.relative_to(checkout).as_posix()}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("other", nargs="?", type=Path, help="another checkout, to compare with")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    columns = {arguments.other.name: measure(arguments.other)} if arguments.other else {}
    columns["here"] = measure(HERE)
    if arguments.json:
        print(json.dumps(columns, indent=1))
    else:
        print(table(columns), details(HERE), sep="\n\n")


if __name__ == "__main__":
    main()
