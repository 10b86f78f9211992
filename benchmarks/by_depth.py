"""Accuracy of a study's runs by the depth of the agents, as a table.

    python benchmarks/by_depth.py runs/paper/12-depth

A row for each label and partition: the mean over agents and seeds of the last accuracy,
the standard deviation of the seeds' means, and in brackets how many seeds there are.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from flower_mcepl import read_run
from flower_mcepl.record.pools import LABEL
from flower_mcepl.record.reading import Run

Groups = dict[tuple[str, str], dict[int, list[float]]]  # means of seeds, by setting and depth


def by_depth(run: Run) -> dict[int, float]:
    """Mean last accuracy of a run's agents of each depth."""
    values = defaultdict(list)
    for agent, row in run.final().items():
        values[int(run.handshakes[agent]["depth"])].append(float(row["accuracy"]))
    return {depth: statistics.fmean(those) for depth, those in sorted(values.items())}


def grouped(runs: Iterable[Run]) -> Groups:
    """Means of all finished runs, seeds together; runs of one depth in one row."""
    groups: Groups = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.finished:
            config = run.config["run_config"]
            key = str(config["partition"]), str(run.study.get(LABEL, run.name))
            for depth, mean in by_depth(run).items():
                groups[key][depth].append(mean)
    return groups


def table(groups: Groups) -> list[str]:
    """Lines of a Markdown table."""
    depths = sorted({depth for means in groups.values() for depth in means})
    lines = [
        f"| | {' | '.join(f'depth {depth}' for depth in depths)} |",
        f"|---{'|---' * len(depths)}|",
    ]
    for (partition, label), means in sorted(groups.items()):
        cells = (_cell(means.get(depth, [])) for depth in depths)
        lines.append(f"| {partition}: {label} | {' | '.join(cells)} |")
    return lines


def _cell(means: list[float]) -> str:
    if not means:
        return "-"
    spread = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
    return f"{statistics.fmean(means):.3f}{spread} ({len(means)})"


def main() -> None:
    """Print the table of the study in a folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", type=Path)
    folders = sorted(path.parent for path in parser.parse_args().study.glob("*/summary.json"))
    print("\n".join(table(grouped(map(read_run, folders)))))


if __name__ == "__main__":
    main()
