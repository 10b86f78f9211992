"""Partitions: who holds which examples of a data set, drawn by flwr-datasets.

Only labels are divided, into indices; so images stay where they are, and any data set
will do. Needs the extra ``vision`` (flwr-datasets), which is imported only when
something is divided.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flower_mcepl.config.specs import COUNT, POSITIVE, Spec, one_of, parse_spec
from flower_mcepl.errors import ConfigError, DataError
from flower_mcepl.streams import check_seed, numpy_stream

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Indices = NDArray[np.int64]
_LABEL, _INDEX = "label", "index"  # columns of what the partitioners see


@final
@dataclass(frozen=True)
class Partition:
    """One way to divide a data set over the agents; make it with :meth:`parse`.

    Attributes
    ----------
    text : str
        The line that it was made from.
    """

    text: str

    def __post_init__(self) -> None:
        parse_spec(self.text, PARTITIONS, noun="partition", error=ConfigError)

    @classmethod
    def parse(cls, text: str) -> "Partition":
        """Make a partition from one line, ``name`` or ``name:key=value,key=value``.

        ``iid``
            Equal parts, drawn at random.
        ``pathological:classes=3``
            So many classes an agent, each divided equally among its holders;
            ``assignment=random`` (default), ``deterministic`` (agent i holds i, i+1,
            ...) or ``first-deterministic`` (arXiv:2102.02079).
        ``dirichlet:alpha=0.3``
            Each class in shares drawn from Dirichlet(alpha) (arXiv:1905.12022); drawn
            anew until every agent has ``min-size=10`` examples.
        ``shards:per-agent=2``
            Examples sorted by class, cut into equal shards, so many for each agent
            (arXiv:1602.05629); what is left over, under one example a shard, is unused.
        ``linear``, ``square``, ``exponential``
            Drawn at random, in sizes proportional to i + 1, (i + 1)² or exp(i + 1) for
            agent i.

        Raises
        ------
        ConfigError
            If the name or an option is unknown, missing, or of the wrong kind.
        """
        if not isinstance(text, str):
            raise ConfigError(
                f'partition must be a text such as "pathological:classes=3"; got {text!r}.'
            )
        return cls(text)

    def divide(self, labels: ArrayLike, *, num_agents: int, seed: int) -> tuple[Indices, ...]:
        """Examples of each agent as indices into ``labels``; none goes to two agents.

        The same arguments give the same parts on every machine; all agents of a run
        must pass the same.

        Parameters
        ----------
        labels : array of int or str, shape [num_examples]
            The class of every example.
        num_agents : int
            Number of parts.
        seed : int
            Of everything that is drawn.

        Raises
        ------
        DataError
            If the labels cannot be divided so, or an agent would get no example.
        ConfigError
            If flwr-datasets is missing, or the seed is out of range.
        """
        seed = check_seed(seed)
        name, spec, options = parse_spec(self.text, PARTITIONS, noun="partition", error=ConfigError)
        classes = np.asarray(labels)
        if classes.ndim != 1 or len(classes) < num_agents:
            raise DataError(
                f"partition {self.text!r} needs one label for each example, and at least one "
                f"example for each of {num_agents} agents; got labels of shape "
                f"{list(classes.shape)}. Use fewer agents or more data."
            )
        with _vision_extra():
            from datasets import Dataset

            partitioner: Partitioner = spec.build(num_agents, seed, **options)
        order = np.arange(len(classes))
        if name in _IN_ORDER:  # they cut the data set as it lies, which may be sorted by class
            order = numpy_stream(seed, "partition").permutation(len(classes))
        partitioner.dataset = Dataset.from_dict({_LABEL: classes[order], _INDEX: order})
        return self._load(partitioner, num_agents)

    def _load(self, partitioner: "Partitioner", num_agents: int) -> tuple[Indices, ...]:
        try:
            with warnings.catch_warnings():
                # of classes that nobody holds, and of every draw that was too small
                warnings.simplefilter("ignore")
                parts = [
                    partitioner.load_partition(agent).with_format("numpy")
                    for agent in range(num_agents)
                ]
        except (ValueError, ZeroDivisionError) as error:
            problem, way_out = _explained(error, partitioner)
            raise DataError(
                f"partition {self.text!r} is impossible for {num_agents} agents: {problem}. "
                f"{way_out}"
            ) from error
        return tuple(np.asarray(part[_INDEX], dtype=np.int64) for part in parts)


def _explained(error: Exception, partitioner: "Partitioner") -> tuple[str, str]:
    """Say in our words what a partitioner could not do, and the way out."""
    sizes = getattr(partitioner, "partition_id_to_size", {})
    empty = [agent for agent, size in sizes.items() if size < 1]
    if empty:
        return (
            f"agent {empty[0]} would get no example",
            "Use fewer agents, more data, or parts of less unequal sizes.",
        )
    if "max number of attempts" in str(error):
        return (
            "some agent always got fewer than min-size",
            "Raise alpha, lower min-size, or use fewer agents.",
        )
    if isinstance(error, ZeroDivisionError):
        return "there are more shards than examples", "Lower per-agent, or use fewer agents."
    return str(error).rstrip("."), "Use fewer agents, more data, or another partition."


@contextmanager
def _vision_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'the key partition needs {error.name}: pip install "flower-mcepl[vision]" (in a '
            'clone: pip install -e ".[vision]").'
        ) from error


def _partitioner(name: str, **options: Any) -> "Partitioner":
    from flwr_datasets import partitioner

    built: Partitioner = getattr(partitioner, name)(**options)
    return built


def _pathological(n: int, seed: int, classes: int, assignment: str = "random") -> "Partitioner":
    return _partitioner(
        "PathologicalPartitioner",
        num_partitions=n,
        partition_by=_LABEL,
        num_classes_per_partition=classes,
        class_assignment_mode=assignment,
        seed=seed,
    )


def _dirichlet(n: int, seed: int, alpha: float, min_size: int = 10) -> "Partitioner":
    return _partitioner(
        "DirichletPartitioner",
        num_partitions=n,
        partition_by=_LABEL,
        alpha=alpha,
        min_partition_size=min_size,
        seed=seed,
    )


def _shards(n: int, seed: int, per_agent: int) -> "Partitioner":
    return _partitioner(
        "ShardPartitioner",
        num_partitions=n,
        partition_by=_LABEL,
        num_shards_per_partition=per_agent,
        seed=seed,
    )


def _sized(name: str) -> Callable[[int, int], "Partitioner"]:
    return lambda n, seed: _partitioner(name, num_partitions=n)


# built from the number of agents, the seed and the options
PARTITIONS: "dict[str, Spec[Partitioner]]" = {
    "iid": Spec(_sized("IidPartitioner")),
    "pathological": Spec(
        _pathological,
        needs={"classes": COUNT},
        takes={"assignment": one_of("random", "deterministic", "first-deterministic")},
    ),
    "dirichlet": Spec(_dirichlet, needs={"alpha": POSITIVE}, takes={"min-size": COUNT}),
    "shards": Spec(_shards, needs={"per-agent": COUNT}),
    "linear": Spec(_sized("LinearPartitioner")),
    "square": Spec(_sized("SquarePartitioner")),
    "exponential": Spec(_sized("ExponentialPartitioner")),
}
_IN_ORDER = ("iid", "linear", "square", "exponential")
