"""A parcel as records of a Flower message."""

from flwr.app import Array, ArrayRecord, ConfigRecord

from flower_mcepl.exchange.parcels import Parcel
from flower_mcepl.messages import keys


def order_of(
    parcel: Parcel[Array], config: ConfigRecord, *, run: str, max_staleness: int, introduce: bool
) -> ConfigRecord:
    """Return what the agent has to do; it stands above what ``config``, the user's, says under the same keys."""
    order = ConfigRecord(
        {
            **config,
            keys.VERSION: keys.MESSAGE_VERSION,
            keys.RUN: run,
            keys.ROUND: parcel.round,
            keys.FUSE: parcel.neighbors is not None,
            keys.EVALUATE: parcel.evaluate,
            keys.TRAIN: parcel.train,
            keys.MAX_STALENESS: max_staleness,
            keys.WHOLE: parcel.whole,
            keys.INTRODUCE: introduce,
        }
    )
    if parcel.acknowledged is not None:
        order[keys.ACKNOWLEDGED] = parcel.acknowledged
    if parcel.neighbors:
        order[keys.NEIGHBORS] = list(parcel.neighbors)
    return order


def frames_of(parcel: Parcel[Array]) -> ArrayRecord:
    """Return the parcel's frames, as the arrays that they came in: no copies."""
    frames = ArrayRecord()
    for sender, chain in parcel.frames.items():
        frames.update({f"{sender}/{place}": array for place, array in enumerate(chain)})
    return frames
