"""Graphs in files: an adjacency matrix, or an edge list."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from flower_mcepl.errors import TopologyError
from flower_mcepl.topology.families import Edge
from flower_mcepl.topology.schedules import FixedLinks

_Matrix = npt.NDArray[np.float64]


def read_graph(
    path: str | Path, *, num_agents: int | None = None, directed: bool = False
) -> FixedLinks:
    """Links that stand in a file; ``Topology.from_file`` says what it may hold."""
    rows = _read_npy(path) if Path(path).suffix == ".npy" else _read_text(path)
    if isinstance(rows, list) and all(len(row) == 2 for row in rows):
        edges = _edge_list(rows, path)
        size = _size(edges, path) if num_agents is None else num_agents
        return FixedLinks.from_edges(edges, num_agents=size, directed=directed)
    matrix = _adjacency(rows, path)
    if num_agents not in (None, len(matrix)):
        raise TopologyError(
            f"the matrix in {path} has {len(matrix)} agents, but {num_agents} are asked for. "
            "Change num_agents or the file."
        )
    return FixedLinks.from_edges(
        [(i, j) for i, j in np.argwhere(matrix).tolist()],
        num_agents=len(matrix),
        directed=directed or not np.array_equal(matrix, matrix.T),
    )


def _size(edges: list[Edge], path: str | Path) -> int:
    """Number of agents of an edge list that stands alone."""
    named = {agent for edge in edges for agent in edge}
    size = 1 + max(named, default=-1)
    if size > 2 * len(named):  # numbers of something else: memory for each would be taken
        raise TopologyError(
            f"an edge list numbers its agents 0, 1, 2...; {path} names {len(named)} agents, the "
            f"highest of them {size - 1}. Number them anew, or pass num_agents if the others have "
            "no link."
        )
    return size


def _read_npy(path: str | Path) -> _Matrix:
    try:
        rows = np.asarray(np.load(path, allow_pickle=False))
        return rows.astype(np.float64, casting="same_kind")  # complex: refused, not cut off
    except (OSError, EOFError, TypeError, ValueError) as error:
        raise TopologyError(
            f"a .npy graph must be a saved matrix of 0 and 1; {path}: {error}."
        ) from error


def _read_text(path: str | Path) -> list[list[float]]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TopologyError(
            f"a graph must be a readable text file or a .npy file; {path}: {error}."
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append([float(x) for x in line.partition("#")[0].replace(",", " ").split()])
        except ValueError:
            raise TopologyError(
                f"a graph in text holds only numbers and # comments; line {number} of {path} is "
                f"{line!r:.80}."
            ) from None
    return [row for row in rows if row]


def _edge_list(rows: list[list[float]], path: str | Path) -> list[Edge]:
    for row in rows:
        if not all(x.is_integer() and x >= 0 for x in row):
            raise TopologyError(
                f"an edge list holds pairs of agents 0, 1, 2...; {path} has a line {row}."
            )
    return [(int(sender), int(receiver)) for sender, receiver in rows]


def _adjacency(rows: _Matrix | list[list[float]], path: str | Path) -> npt.NDArray[np.bool_]:
    shape = (
        rows.shape
        if isinstance(rows, np.ndarray)
        else (len(rows), *sorted({len(row) for row in rows}))
    )
    if len(shape) != 2 or shape[0] != shape[1]:
        raise TopologyError(
            f"an adjacency matrix must be square; {path} has {shape[0] if shape else 0} rows of "
            f"{' or '.join(map(str, shape[1:])) or 'no'} numbers. An edge list has two numbers in "
            "every line."
        )
    matrix = np.asarray(rows)
    for i, j in np.argwhere(~np.isin(matrix, (0, 1)))[:1]:
        raise TopologyError(
            f"an adjacency matrix holds only 0 and 1; {path} has {matrix[i, j]:g} in row {i}, "
            f"column {j} (from 0). Links have no weights here."
        )
    return matrix.astype(np.bool_)
