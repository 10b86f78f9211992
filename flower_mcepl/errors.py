"""The errors of flower_mcepl, one class per remedy.

::

    FlowerMceplError
    ├── ConfigError             a setting is wrong, unknown or contradictory: change it
    ├── UnsupportedLayerError   the module cannot be masked as it is: change the module
    ├── DataError               an agent's data are empty or malformed: change its data
    ├── TopologyError           the graph is impossible: change the graph
    ├── RosterError             the nodes do not fit the graph: change what is started
    │   └── LostWorkerError         a process of the simulation died: resume the run
    ├── IncompleteRunError      closing answers are missing: resume the run
    ├── AnswerError             a node's answer is no agent's: it failed in this round
    ├── FingerprintError        two hold other frozen weights: align seeds or models
    ├── DivergedError           training left the finite numbers: lower the step size
    ├── StateError              a saved state is damaged or foreign: use another
    ├── RecordError             a run record cannot be written or read
    ├── LaunchError             Flower's programs do not work: mend the installation
    └── FrameError              one frame is refused; the run goes on
        ├── TruncatedFrameError     shorter than it says
        ├── CorruptFrameError       damaged: checksum or structure
        ├── ForeignFrameError       not a frame, or a frame of another model or agent
        ├── FutureFrameError        of a newer version, or of a round still to come
        ├── ReplayedFrameError      not newer than what is already held of this sender
        └── MissingReferenceError   builds on a frame not held: it comes next
"""

import re
import typing
import unicodedata

# Environment variables with paths of files, for a launcher and its run. The existence
# of the first asks a run to stop, as Ctrl-C does where there is a terminal; the run
# deletes it when its summary is written. Into the second it writes its record's path.
STOP_REQUEST = "FLOWER_MCEPL_STOP"
RECORD_NOTE = "FLOWER_MCEPL_RECORD"


class FlowerMceplError(Exception):
    """Base of every error that flower_mcepl raises on purpose."""


class ConfigError(FlowerMceplError, ValueError):
    """A setting is out of range, unknown or contradicts another one."""


class UnsupportedLayerError(FlowerMceplError, TypeError):
    """The module has nothing to mask, or a layer that cannot be masked."""


class DataError(FlowerMceplError, ValueError):
    """The data of an agent are empty or malformed."""


class TopologyError(FlowerMceplError, ValueError):
    """The graph is impossible, or it does not know the agent."""


class RosterError(FlowerMceplError):
    """The connected nodes do not fit the agents of the graph."""


class LostWorkerError(RosterError):
    """A process of Flower's simulation died, and nothing in Flower replaces it."""


class IncompleteRunError(FlowerMceplError):
    """The rounds are over, but agents did not answer the closing exchange."""


class AnswerError(FlowerMceplError):
    """A node's answer is not that of an agent, or it is damaged."""


class FingerprintError(FlowerMceplError):
    """Two participants do not hold the same frozen weights."""


class DivergedError(FlowerMceplError, ArithmeticError):
    """Training produced a loss or scores that are not finite."""


class StateError(FlowerMceplError):
    """A saved state is damaged, or belongs to another agent, model or algorithm."""


class RecordError(FlowerMceplError):
    """A run record cannot be written or read."""


class LaunchError(FlowerMceplError):
    """Flower's programs are missing, do not start or do not answer."""


class FrameError(FlowerMceplError):
    """A frame is refused."""


class TruncatedFrameError(FrameError):
    """The frame is shorter than its header says."""


class CorruptFrameError(FrameError):
    """The frame is damaged: its checksum or its structure is wrong."""


class ForeignFrameError(FrameError):
    """The bytes are no frame, or a frame of another model or agent."""


class FutureFrameError(FrameError):
    """The frame has a newer format, or comes from a round that has not begun."""


class ReplayedFrameError(FrameError):
    """The frame is not newer than what is already held of its sender."""


class MissingReferenceError(FrameError):
    """The frame builds on an earlier one that the receiver does not hold as it was."""


def visible(text: str, *, lines: bool = False) -> str:
    """Text of somebody else with control characters spelled out, for log and terminal.

    They could forge lines of a log, or make a terminal do what nobody asked it to. So
    could those that turn the direction of writing. With ``lines`` newlines and tabs
    stay.
    """
    if text.isascii() and text.isprintable():
        return text

    def spelled(char: str) -> str:
        kind = unicodedata.category(char)
        controls = kind.startswith("C") or kind in ("Zl", "Zp")
        if not controls or (lines and char in "\n\t"):
            return char
        return char.encode("unicode_escape").decode()

    return "".join(map(spelled, text))


def visible_json(value: typing.Any) -> typing.Any:
    """JSON of somebody else with the control characters of its texts spelled out."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        return [visible_json(item) for item in value]
    if isinstance(value, dict):
        return {visible(str(key)): visible_json(item) for key, item in value.items()}
    return value


def first_line(reason: str, *, most: int = 200) -> str:
    """First line of a reason, cut to so many characters, for a log or a summary."""
    line = next(iter(reason.strip().splitlines()), "")
    return line if len(line) <= most else f"{line[: most - 3]}..."


def same_reason(reason: str) -> str:
    """First line of a reason without its numbers, which differ between agents."""
    return re.sub(r"\d+", "#", first_line(reason))


def names_agent(error: Exception, agent: int) -> bool:
    """Tell whether an error's message says which agent it is about."""
    return re.search(rf"\bagent {agent}\b", str(error)) is not None
