"""Write the tables of keys in ``docs/*.md`` from the settings classes.

    python docs/reference.py

A table says each field's key, its default, and what the comment beside the field or the
class's docstring says. It stands between two marks in its page;
`tests/docs/test_docs.py` fails while one is out of date.
"""

import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flower_mcepl.agents import ALGORITHMS, Algorithm, MceplConfig
from flower_mcepl.agents.parts.initial_weights import InitialWeights
from flower_mcepl.data import DataSettings
from flower_mcepl.runs.settings import DeviceSettings, RunSettings

DOCS = Path(__file__).parent

# What stands neither beside a field nor in the docstring. Keys that are no field stand
# here whole.
NOTES = {
    "algorithm": "which method: see [algorithms](algorithms.md)",
    "num-agents": "agents in the graph; start as many nodes",
    "num-rounds": "rounds; a closing exchange follows the last one",
    "seed": "whole number from 0 to 2^63 - 1, of everything that is random: weights, scores, "
    "batches, graph, division of the data",
    "topology": "who hears whom: see [topologies](topologies.md)",
    "evaluate-on": 'split that accuracy and loss are of: `"test"`, or `"validation"` to choose '
    "settings by",
    "wait-timeout": "seconds to wait for the first nodes, and again in any round without one",
    "resume": "the record of a run that broke off, relative as `record-dir` is; the run goes on "
    "in there: see [resuming](resume.md)",
    "checkpoint-every": "rounds between [checkpoints](resume.md) in the run record; 0: none",
    "state-dir": "folder of the agent's states on a device, from its node config alone: see "
    "[deployment](deployment.md); "
    '`""`: below the user\'s home; `"none"`: they stay in Flower\'s `Context`',
    "partition": "who holds which examples: see [data](data.md)",
    "train-fraction": "share of an agent's examples that it learns from",
    "test-fraction": "share that it is tested on; 0 where the data set has test examples of its "
    "own",
    "validation-fraction": 'share that it is evaluated on where `evaluate-on = "validation"`',
    "test-split": "of a data set's own test examples: `\"classes\"`: all of the agent's classes; "
    '`"proportional"`: as many as can be had in the agent\'s class shares',
    "batch-size": "examples in a mini-batch",
    "weight-averaging": "β in [0, 1): evaluate at the running mean of the weights, "
    "`x̄ = β x̄ + (1 - β) x`; 0: at the weights",
    "arithmetic": 'of the network in training and evaluation: `"exact"`: torch\'s own; `"fast"`: '
    "the same functions in float32, summed in another order, 1.3 to 1.7 times as fast on a CPU; "
    '`"bfloat16"`: that with bfloat16 products. Bits are equal within a class; see '
    "[benchmarks](benchmarks.md)",
    "eval-batch-size": "examples a batch in evaluation; large ones are slower on a CPU",
    "lr": "η > 0: step size on the weights",
    "lr-rounds": "length of the cosine in rounds; 0: `num-rounds`",
    "lr-warmup": "rounds of a linear warmup: round t of them has t / `lr-warmup` of its step size",
    "fusion": 'how the neighbors\' masks count: `"mcepl"`, `"mask-averaging"`, `"none"`, or a rule '
    "[of your own](extending.md)",
    "weight-init": '`"module"`: frozen weights as the model function makes them; '
    '`"signed-constant"`: `± sqrt(1 / fan_in)` in place of the maskable ones, signs drawn by layer '
    "name from the seed",
    "score-gradient": '`"raw"`: g as it is (paper); `"normalized"`: `g / sqrt(mean(g²))` per '
    "layer, before weight decay and momentum; a `score-lr` of 0.0005 then suits; "
    '`"filter-normalized"`: `2 g / (rms of the layer + rms of the filter)`',
    "fusion-strength": "c >= 0: factor on what was heard, `y = z + c * mean(abs(z)) * sign(z) * n`"
    "; 1 in the paper; rules of fusion that rank an agent's scores alone go without",
    "fusion-rounds": "length of the `fusion-schedule` in rounds; 0: `num-rounds`",
    "group-lasso": "λ >= 0: weight of the group lasso on the scores",
    "anneal-rounds": "T: rounds in which the share of weights that move falls to zero; 0: "
    "`num-rounds`",
    "record-dir": "folder in which the run record is made, relative to the SuperLink's working "
    "directory",
    "retention-conv": "r of convolutions, 0 < r <= 1; several, separated by commas, are taken in "
    'turn: `"0.1, 0.3, 0.5"`',
    "retention-linear": "r of linear layers, likewise",
    "retention-layers": "r of single layers, by name or pattern, for all agents: "
    '`"conv1.weight=0.6, fc*=0.95"`',
    "depth": "[stages](algorithms.md#agents-of-unequal-depth) that the agent holds of a network "
    'that has them, from the first on; several are taken in turn: `"2, 3, 4"`; 0: all',
    "filters": "ρ in (0, 1]: share of the [filters](algorithms.md) that stays on, in layers that "
    'have gates; several are taken in turn: `"0.25, 0.5, 1.0"`; `"auto"`: '
    "[the device chooses](algorithms.md#filters-that-the-device-chooses)",
    "step-budget": 'with `filters = "auto"`, > 0: what a local step may take',
    "step-budget-unit": '`"seconds"`, or `"joules"` of the processors where the machine tells them',
    "filters-training": '`"full"`: a local step calculates all filters; `"compact"`: '
    "[those that are on](algorithms.md#filters-that-are-off), but for one step in "
    "`filters-refresh`, while gates stand still",
    "filters-refresh": 'with `filters-training = "compact"`, >= 1: one local step in so many is a '
    "whole one, counted over the rounds",
    "filters-rounds": "length of the cubic schedule from 1 down to ρ; 0: half of `num-rounds`",
    "filters-warmup": "rounds with all filters on before it; 0: a tenth of `num-rounds`",
    "filters-layers": 'ρ of single layers, by name or pattern, for all agents: `"conv1.weight=0.8"`'
    "; 1: no gates. Convolutions and linear layers have them, but the first and the last layer, "
    "in the order in which the network registers them",
    "retention-budget": '`"layer"`: each layer keeps its retention; `"network"`: all together keep '
    "as many weights, those of the largest `abs(y)` over its mean in the layer, zeros left out",
    "block": '`"2:4"`: linear layers whose number of inputs is a multiple of 4 keep the 2 of '
    "largest `abs(y)` of every 4 inputs, so half of their weights "
    '([blocks](algorithms.md#two-of-four)); `"none"`: any',
    "lasso-step": '`"gradient"`: the lasso is part of the loss (paper); `"proximal"`: each step on '
    "the loss is followed by `z_f * max(0, 1 - ηλ / norm(z_f))`, which ends at zero",
}


def comments(cls: type) -> dict[str, str]:
    """The comment above or beside each field that a class itself declares."""
    lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    beside = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline)
        if token.type == tokenize.COMMENT
    }
    texts: dict[str, str] = {}
    above: list[str] = []
    for number, line in enumerate(lines, start=1):
        if match := re.match(r"    (\w+): ", line):
            texts[match[1]] = " ".join([*above, *([beside[number]] if number in beside else [])])
        above = [*above, beside[number]] if line.lstrip().startswith("#") else []
    return texts


def parameters(cls: type) -> dict[str, str]:
    """What the section Parameters of a class's own docstring says of each."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("Parameters\n----------\n")[2]
    entries = re.findall(r"^(\w+) : .*\n((?:    .*\n?)+)", section, re.MULTILINE)
    return {name: as_phrase(" ".join(text.split())) for name, text in entries}


def as_phrase(sentence: str) -> str:
    """A sentence as it stands in a table: it begins small and has no full stop."""
    return sentence[0].lower() + sentence[1:].removesuffix(".")


def fields(cls: type) -> dict[str, str]:
    """The comments of all public fields that a class has, its parents' first."""
    texts: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if parent.__module__.startswith("flower_mcepl"):
            texts |= {name: text for name, text in comments(parent).items() if text}
    return {name: text for name, text in texts.items() if not name.startswith("_")}


def meaning(cls: type, name: str) -> str:
    """What a field means: from `NOTES`, or from the first class that says it."""
    if note := NOTES.get(key_of(name)):
        return note
    for parent in cls.__mro__:
        if dataclasses.is_dataclass(parent):
            if text := comments(parent).get(name) or parameters(parent).get(name):
                return as_markdown(text)
    raise SystemExit(f"{cls.__name__}.{name} needs a comment that says what it means.")


def as_markdown(comment: str) -> str:
    """A comment with its values and its fields as code; fields bear their keys."""
    code = r'"[^"]*"|\bflower_mcepl(?:\.\w+)+'
    text = re.sub(code, r"`\g<0>`", comment)
    field = r"(?<![`.])\b[a-z]+(?:_[a-z]+)+\b(?!\.)"
    return re.sub(field, lambda match: f"`{key_of(match[0])}`", text)


def key_of(name: str) -> str:
    """The run-config key of a field."""
    return name.replace("_", "-")


def toml(value: Any) -> str:
    """A value as one writes it in a run config."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


def rows(heads: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table."""
    cells = [heads, ["---"] * len(heads), *lines]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in c) + " |" for c in cells
    )


def settings_table(cls: type) -> str:
    """Key, default and meaning of every field; those of the parents come last."""
    own = list(inspect.get_annotations(cls))
    return rows(
        ["key", "default", "meaning"],
        (
            [f"`{key_of(field.name)}`", f"`{toml(field.default)}`", meaning(cls, field.name)]
            for field in sorted(dataclasses.fields(cls), key=lambda field: field.name not in own)
        ),
    )


def algorithms_table() -> str:
    """Every key of the algorithms: who reads it, and its defaults."""
    defaults: dict[str, dict[str, Any]] = {}
    texts: dict[str, str] = {}
    for name, algorithm in built_in().items():
        for key, value, text in algorithm_keys(algorithm):
            defaults.setdefault(key, {})[name] = value
            texts.setdefault(key, text)
    return rows(
        ["key", "of", "default", "meaning"],
        (
            [f"`{key}`", readers(values), default_text(values), texts[key]]
            for key, values in defaults.items()
        ),
    )


def built_in() -> dict[str, Algorithm]:
    """The algorithms of this package, without those of others that are installed."""
    own = (
        name for name in ALGORITHMS if ALGORITHMS[name].agent.__module__.startswith("flower_mcepl.")
    )
    return {name: ALGORITHMS[name] for name in own}


def algorithm_keys(algorithm: Algorithm) -> Iterable[tuple[str, Any, str]]:
    """Key, default and meaning of the settings that an algorithm reads."""
    config, read = algorithm.config, algorithm.keys()
    for field in dataclasses.fields(config):
        if field.name == "retention":
            ratios = {f"retention-{kind}": ratio for kind, ratio in MceplConfig().retention.items()}
            for key, value in {**ratios, "retention-layers": ""}.items():
                yield key, value, NOTES[key]
        elif key_of(field.name) in read:
            yield key_of(field.name), field.default, meaning(config, field.name)


def readers(values: dict[str, Any]) -> str:
    """Who reads a key."""
    known = built_in()
    masks = [name for name in known if issubclass(known[name].config, MceplConfig)]
    others = [name for name in values if name not in masks]
    if len(values) == len(known):
        return "all"
    if set(masks) <= set(values):
        return ", ".join(["mcepl and its ablations", *others])
    return ", ".join(values)


def default_text(values: dict[str, Any]) -> str:
    """The most usual default, then the others with their algorithms."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(f"`{toml(value)}`", []).append(name)
    first, *others = sorted(names, key=lambda text: -len(names[text]))
    return "; ".join([first, *(f"{text} in {', '.join(names[text])}" for text in others)])


TABLES = {
    "RunSettings": lambda: settings_table(RunSettings),
    "DeviceSettings": lambda: settings_table(DeviceSettings),
    "DataSettings": lambda: settings_table(DataSettings),
    "InitialWeights": lambda: settings_table(InitialWeights),
    "algorithms": algorithms_table,
}
MARKS = re.compile(r"(<!-- keys: (\w+) -->\n).*?(<!-- end of keys -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """The text of a page with its tables as they are now."""
    return MARKS.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}", page)


def main() -> None:
    """Bring every page up to date."""
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (new := with_tables(text)) != text:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
