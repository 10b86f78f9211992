"""FedAvg as Flower itself calculates it."""

from collections.abc import Sequence
from typing import final

import torch
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from flower_mcepl.agents.agent import Payload
from flower_mcepl.agents.fedavg import FedavgServer

_ARRAYS, _METRICS, _WEIGHT = "arrays", "metrics", "num-examples"  # as FedAvg expects them


@final
class FlowerFedavgServer(FedavgServer):
    """FedAvg's server with the mean of Flower's own ``FedAvg.aggregate_train``.

    So a comparison with FedAvg is one with the FedAvg that everyone knows; messages,
    frames and the record are those of every other algorithm here.
    """

    def _mean(
        self, models: Sequence[Payload], sizes: Sequence[int], *, round: int
    ) -> dict[str, Tensor]:
        replies = [_reply(model, size) for model, size in zip(models, sizes, strict=True)]
        arrays, _ = FedAvg(weighted_by_key=_WEIGHT).aggregate_train(round, replies)
        assert arrays is not None  # there was a reply
        return {name: torch.from_numpy(arrays[name].numpy().copy()) for name in self.weights}


def _reply(model: Payload, num_examples: int) -> Message:
    """Return what an agent of an ordinary FedAvg app would have answered."""
    arrays = ArrayRecord(
        {name: Array(weight.contiguous().numpy()) for name, weight in model.items()}
    )
    content = RecordDict({_ARRAYS: arrays, _METRICS: MetricRecord({_WEIGHT: num_examples})})
    return Message(content, dst_node_id=0, message_type=MessageType.TRAIN)
