"""What of a network no state could hold is refused before anything is learned."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flower_mcepl import UnsupportedLayerError
from flower_mcepl.agents import ALGORITHMS, AgentState
from tests.oracles.baselines import agent_of, two_layers


def with_buffer(buffer: Tensor) -> nn.Module:
    net = two_layers()
    net.register_buffer("extra", buffer)
    return net


@pytest.mark.parametrize("algorithm", [*ALGORITHMS])
@pytest.mark.parametrize(
    "buffer",
    [
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.complex128),
        torch.eye(2).to_sparse(),
    ],
    ids=["bfloat16", "complex128", "sparse"],
)
def test_a_buffer_that_no_state_holds_is_refused_by_name(algorithm: str, buffer: Tensor) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"saved state can hold; extra is torch\..*"):
        agent_of(algorithm, model_fn=lambda: with_buffer(buffer))


@pytest.mark.parametrize("algorithm", [*ALGORITHMS])
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazy_network_is_refused_by_name(algorithm: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"0\.weight has no shape yet"):
        agent_of(algorithm, model_fn=lambda: nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.complex64])
def test_other_buffers_survive_in_a_state(dtype: torch.dtype) -> None:
    agent = agent_of("mcepl", model_fn=lambda: with_buffer(torch.ones(2, dtype=dtype)))
    state = AgentState.decode(agent.state().encode())
    assert state.arrays["buffer/extra"].dtype == torch.empty(0, dtype=dtype).numpy().dtype
    assert np.array_equal(state.arrays["buffer/extra"], torch.ones(2, dtype=dtype).numpy())
