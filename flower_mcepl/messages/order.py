"""Order: what an agent has to do in a round, in Flower's records and back."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, final

import numpy as np

from flower_mcepl.agents.array_layout import ArrayLayout
from flower_mcepl.errors import ConfigError
from flower_mcepl.exchange.parcels import FrameT, Parcel
from flower_mcepl.messages import keys
from flower_mcepl.messages.limits import (
    LIMITS,
    MOST_WEIGHTS,
    Fields,
    Limits,
    MakeRecord,
    Records,
    is_setting,
)

_OWN = frozenset(
    {keys.VERSION, keys.RUN, keys.ROUND, keys.FUSE, keys.EVALUATE, keys.TRAIN, keys.MAX_STALENESS}
    | {keys.WHOLE, keys.INTRODUCE, keys.ACKNOWLEDGED, keys.NEIGHBORS, keys.CHECKPOINTS}
    | {keys.STORE, keys.LAYOUT, keys.KEPT_AGENTS, keys.KEPT_COUNTS}
    | {keys.KEEP_BEST, keys.AGED_AGENTS, keys.AGES, keys.AGE_DECAY}
)
_PLACE = re.compile("(0|[1-9][0-9]{0,8})/(0|[1-9][0-9]{0,8})")  # sender / place in its chain
_DTYPE = re.compile(r"[<>|][biufcmMOSUV][0-9]{0,9}(\[[^\]]{1,20}\])?")
_WAY_OUT = ". Use GossipStrategy, and the same release of flower-mcepl on server and devices."


@final
@dataclass(frozen=True, kw_only=True)
class AppInput(Generic[FrameT]):
    """Input of an app written for FedAvg that has `NeighborAverageMod` before it."""

    layout: ArrayLayout  # of its arrays
    arrays: Mapping[str, FrameT] | None = None  # these; None where the node has them
    train_config: Mapping[str, Any] = field(default_factory=dict)
    evaluate_config: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class Order(Generic[FrameT]):
    """What one agent has to do in one round, and what it needs for it.

    Parameters
    ----------
    parcel : Parcel
        Round, frames of the neighbors, and whether to evaluate and train. Frames stay
        in Flower's arrays, as they came: nobody opens them here.
    run : str
        16 hex digits that stand for the run, the same when it is resumed.
    max_staleness : int
        Rounds for which an absent neighbor's last mask stays in use.
    age_decay : float (default: 1.0)
        What a neighbor's vote is multiplied by for each round of its age.
    introduce : bool
        Whether the answer needs the agent's handshake: the relay does not know it.
    checkpoints : tuple of int
        Rounds that the relay could go back to.
    keep_best : bool
        Whether to keep the state that is evaluated, if it is the best so far.
    store : bool
        In simulation: whether the relay wants the state after this round, and at the
        end the exported model, for the run record.
    state : frame, optional
        In simulation: the encoded state from which the agent goes on in a resumed run.
    config : mapping
        What the user says to the app. Under a key of the order's own it does not count.
    app : AppInput, optional
        For an app of `NeighborAverageMod`.
    """

    parcel: Parcel[FrameT]
    run: str
    max_staleness: int
    introduce: bool
    age_decay: float = 1.0
    checkpoints: tuple[int, ...] = ()
    keep_best: bool = False
    store: bool = False
    state: FrameT | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    app: AppInput[FrameT] | None = None

    def __post_init__(self) -> None:
        others = {key: value for key, value in self.config.items() if key not in _OWN}
        object.__setattr__(self, "config", others)

    def to_records(self, arrays: MakeRecord = dict, configs: MakeRecord = dict) -> dict[str, Any]:
        """Records of the order, made by ``arrays`` and ``configs``."""
        parcel, app = self.parcel, self.app
        order = {
            **self.config,
            keys.VERSION: keys.MESSAGE_VERSION,
            keys.RUN: self.run,
            keys.ROUND: parcel.round,
            keys.FUSE: parcel.neighbors is not None,
            keys.EVALUATE: parcel.evaluate,
            keys.TRAIN: parcel.train,
            keys.MAX_STALENESS: self.max_staleness,
            keys.WHOLE: parcel.whole,
            keys.INTRODUCE: self.introduce,
        }
        if parcel.acknowledged is not None:
            order[keys.ACKNOWLEDGED] = parcel.acknowledged
        optional = {
            keys.NEIGHBORS: list(parcel.neighbors or ()),
            keys.KEPT_AGENTS: list(parcel.kept),
            keys.KEPT_COUNTS: [count for counts in parcel.kept.values() for count in counts],
            keys.AGED_AGENTS: list(parcel.ages or ()),
            keys.AGES: list((parcel.ages or {}).values()),
            keys.AGE_DECAY: self.age_decay if self.age_decay != 1 else None,
            keys.CHECKPOINTS: list(self.checkpoints),
            keys.KEEP_BEST: self.keep_best,
            keys.STORE: self.store,
            keys.LAYOUT: None if app is None else app.layout.to_json(),
        }
        # Flower's tools trip over empty lists
        order |= {key: value for key, value in optional.items() if value}
        records = {keys.FRAMES: arrays(_places(parcel)), keys.ORDER: configs(order)}
        if self.state is not None:
            records[keys.STATE] = arrays({keys.GENERATION: self.state})
        if app is not None:
            settings = {
                keys.TRAIN_CONFIG: app.train_config,
                keys.EVALUATE_CONFIG: app.evaluate_config,
            }
            records |= {key: configs(dict(value)) for key, value in settings.items() if value}
            if app.arrays is not None:
                records[keys.INITIAL] = arrays(dict(app.arrays))
        return records

    @classmethod
    def from_records(cls, records: Records, limits: Limits = LIMITS) -> "Order[Any]":
        """Check and read the records of a message, as `to_records` writes them.

        Raises
        ------
        ConfigError
            If they are none of `GossipStrategy`, or of another release; or a field is
            missing, of another type or beyond its limits.
        """
        fields = Fields(
            records.get(keys.ORDER, {}),
            keys.ORDER,
            error=ConfigError,
            limits=limits,
            way_out=_WAY_OUT,
        )
        version = fields.rest.pop(keys.VERSION, None)
        fields.check(
            version == keys.MESSAGE_VERSION and type(version) is int,
            f"this device understands GossipStrategy messages of version {keys.MESSAGE_VERSION}",
            version,
        )
        order = cls(
            run=fields.digest(keys.RUN),
            parcel=_read_parcel(fields, records.get(keys.FRAMES)),
            max_staleness=fields.round(keys.MAX_STALENESS),
            introduce=fields.flag(keys.INTRODUCE),
            age_decay=_read_decay(fields) if keys.AGE_DECAY in fields else 1.0,
            checkpoints=fields.numbers(keys.CHECKPOINTS, most=limits.round),
            keep_best=fields.flag(keys.KEEP_BEST) if keys.KEEP_BEST in fields else False,
            store=fields.flag(keys.STORE) if keys.STORE in fields else False,
            state=_read_state(fields, records),
            app=_read_app(fields, records) if keys.LAYOUT in fields else None,
            config=fields.rest,
        )
        _check_settings(fields)
        return order


def is_order(records: Records) -> bool:
    """Whether a message is an order, sound or not."""
    return keys.ORDER in records


def _places(parcel: Parcel[FrameT]) -> dict[str, FrameT]:
    return {
        f"{sender}/{place}": frame
        for sender, chain in parcel.frames.items()
        for place, frame in enumerate(chain)
    }


def _read_parcel(fields: Fields, frames: object) -> Parcel[Any]:
    fuse = fields.flag(keys.FUSE)
    neighbors = fields.agents(keys.NEIGHBORS)
    fields.check(fuse or not neighbors, f"without {keys.FUSE} there are no neighbors", neighbors)
    return Parcel(
        round=fields.round(keys.ROUND, least=1),
        neighbors=neighbors if fuse else None,
        frames=_read_chains(fields.of(frames, keys.FRAMES)),
        evaluate=fields.flag(keys.EVALUATE),
        train=fields.flag(keys.TRAIN),
        acknowledged=fields.round(keys.ACKNOWLEDGED) if keys.ACKNOWLEDGED in fields else None,
        whole=fields.flag(keys.WHOLE),
        kept=_read_kept(fields),
        ages=_read_ages(fields) if keys.AGED_AGENTS in fields else None,
    )


def _read_decay(fields: Fields) -> float:
    value = fields.rest.pop(keys.AGE_DECAY)
    fits = isinstance(value, float) and 0 < value <= 1
    fields.check(fits, f"{keys.AGE_DECAY} must be a number in (0, 1]", value)
    return float(value)


def _read_ages(fields: Fields) -> dict[int, int]:
    agents = fields.agents(keys.AGED_AGENTS)
    ages = fields.numbers(keys.AGES, most=fields.limits.round)
    rule = f"{keys.AGES} must have an entry for each of {keys.AGED_AGENTS}"
    fields.check(len(ages) == len(agents), rule, ages)
    return dict(zip(agents, ages, strict=True))


def _read_kept(fields: Fields) -> dict[int, tuple[int, ...]]:
    """Counts of each sender: all have as many layers."""
    agents = fields.agents(keys.KEPT_AGENTS)
    most = fields.limits.entries * max(1, len(agents))
    counts = fields.numbers(keys.KEPT_COUNTS, most=MOST_WEIGHTS, entries=most)
    layers, rest = divmod(len(counts), max(1, len(agents)))
    rule = f"{keys.KEPT_COUNTS} must have as many entries for each of {keys.KEPT_AGENTS}"
    fields.check(rest == 0 and bool(agents) == bool(counts), rule, counts)
    return {agent: counts[i * layers : (i + 1) * layers] for i, agent in enumerate(agents)}


def _read_chains(fields: Fields) -> dict[int, list[Any]]:
    """Frames of each sender, oldest first."""
    chains: dict[int, list[Any]] = {}
    fields.check_arrays()
    for key, frame in fields.rest.items():
        place = _PLACE.fullmatch(key)
        chain = chains.setdefault(int(place[1]) if place else 0, [])
        fits = (
            place is not None
            and int(place[1]) <= fields.limits.agent
            and int(place[2]) == len(chain)
        )
        fields.check(fits, f"{keys.FRAMES} must be named as sender/place, in their order", key)
        chain.append(frame)
    return chains


def _read_state(fields: Fields, records: Records) -> Any:
    if keys.STATE not in records:
        return None
    arrays = fields.of(records[keys.STATE], keys.STATE)
    fields.check(
        [*arrays.rest] == [keys.GENERATION],
        f"{keys.STATE} must hold {keys.GENERATION} alone",
        [*arrays.rest],
    )
    arrays.check_arrays()
    return arrays.rest[keys.GENERATION]


def _read_app(fields: Fields, records: Records) -> AppInput[Any]:
    settings = {
        key: fields.of(records.get(key, {}), key)
        for key in (keys.TRAIN_CONFIG, keys.EVALUATE_CONFIG)
    }
    for record in settings.values():
        _check_settings(record)
    arrays = None
    if keys.INITIAL in records:
        initial = fields.of(records[keys.INITIAL], keys.INITIAL)
        initial.check_arrays()
        arrays = initial.rest
    return AppInput(
        layout=_read_layout(fields),
        arrays=arrays,
        train_config=settings[keys.TRAIN_CONFIG].rest,
        evaluate_config=settings[keys.EVALUATE_CONFIG].rest,
    )


def _read_layout(fields: Fields) -> ArrayLayout:
    text = fields.rest[keys.LAYOUT]
    fields.json(keys.LAYOUT, most=fields.limits.layout, depth=fields.limits.depth)
    try:
        layout = ArrayLayout.from_json(text)
        sound = isinstance(layout.fingerprint, str) and all(
            isinstance(name, str)
            and _DTYPE.fullmatch(dtype)
            and np.dtype(dtype).str == dtype
            and all(type(length) is int and length >= 0 for length in shape)
            for name, (dtype, shape) in layout.arrays.items()
        )
    except (LookupError, TypeError, ValueError):
        sound = False
    fields.check(sound, f"{keys.LAYOUT} must tell names, types and shapes of arrays", text)
    return layout


def _check_settings(fields: Fields) -> None:
    """Check what the user says to the app."""
    fields.check_names(entries=fields.limits.entries, printable=False)
    for key, value in fields.rest.items():
        rule = f"a setting ({key}) must be a number, text, bytes, bool or list of one of these"
        fits = is_setting(value, most=fields.limits.setting)
        fields.check(fits, f"{rule}, of at most {fields.limits.setting} characters", value)
