"""What one agent has sent: the payloads that its next frame may build on."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_mcepl.config.checks import check
from flower_mcepl.exchange.held import Held, restore_held
from flower_mcepl.files.bundle import Arrays
from flower_mcepl.wire import Prior, Reference, WrittenFrame, check_fingerprint, write_frame
from flower_mcepl.wire.payload import support_of


class Outbox:
    """Writer of an agent's frames: changes since the newest one that the relay has.

    An answer may be lost on its way. So the sender keeps what it sent until the relay
    says which of it has come, and builds on nothing else. It keeps masks, and with a
    precision of differences the values as its receivers decode them: 4 bytes a weight.
    Each difference is from those, so that errors of rounding do not add up.

    Parameters
    ----------
    owner : int
        Index of the agent that sends.
    fingerprint : str
        Fingerprint of the shared frozen weights, 32 lower-case hex digits.
    layers : Mapping[str, tuple[int, ...]]
        Names and shapes of the layers that it sends.
    prior : Prior | None (default: None)
        Classes of weights that all agents know.
    first : Mapping[str, Tensor] | None (default: None)
        The common first payload, which a whole frame may build on.
    precision : str (default: "float32")
        How floats travel, see `encode_frame`.
    run : str (default: "")
        Id of the run that its frames belong to, see `encode_frame`.
    """

    def __init__(
        self,
        *,
        owner: int,
        fingerprint: str,
        layers: Mapping[str, tuple[int, ...]],
        prior: Prior | None = None,
        first: Mapping[str, Tensor] | None = None,
        precision: str = "float32",
        run: str = "",
    ) -> None:
        self._owner = owner
        self._fingerprint = check_fingerprint(fingerprint)
        self._layers = {name: tuple(shape) for name, shape in layers.items()}
        self._prior, self._precision, self.run = prior, precision, run
        self._first = None if first is None else Reference(0, first)
        self._sent: dict[int, Held] = {}  # by round

    def write(
        self,
        tensors: Mapping[str, Tensor],
        *,
        round: int,
        acknowledged: int | None = None,
        key: bool = False,
    ) -> list[WrittenFrame]:
        """Return the frames of one payload: one, or two of which each suffices.

        Parameters
        ----------
        tensors : Mapping[str, Tensor]
            What goes out.
        round : int
            The round it is sent in.
        acknowledged : int | None (default: None)
            Round of the newest frame of this agent that the relay has; None if it has
            none.
        key : bool (default: False)
            Write a whole frame, too, if the first one is not.

        Raises
        ------
        ConfigError
            If they are not the sender's layers, every receiver would refuse them.
        """
        self._check(tensors)
        self._sent = {r: held for r, held in self._sent.items() if r == acknowledged}
        last = (
            self._sent[acknowledged].reference(self._layers)
            if acknowledged in self._sent
            else self._first
        )
        frames = [self._write(tensors, round, last, self._precision)]
        decoded = frames[0].decoded
        if key and frames[0].reference:
            # What was rounded against one payload cannot be told as a rounded
            # difference from another one.
            precision = "float32" if decoded else self._precision
            frames.append(self._write({**tensors, **decoded}, round, self._first, precision))
        masks = {}
        for name, tensor in tensors.items():
            bits = support_of(tensor)
            if bits is not None:
                masks[name] = torch.from_numpy(bits).reshape(tensor.shape)
        if masks or decoded:
            # Who starts from a whole frame does not know what flipped: the next frame
            # must not presume it.
            flips = frames[0].flips if len(frames) == 1 and frames[0].reference else {}
            self._sent[round] = Held.of(Reference(round, {**masks, **decoded}, flips), self._layers)
        return frames

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        for name in sorted(self._layers.keys() | tensors.keys()):
            tensor, due = tensors.get(name), self._layers.get(name)
            came = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            check(
                isinstance(tensor, Tensor) and came == due,
                f"sender {self._owner} must send the layers that it declares, as tensors of these "
                f"shapes; layer {name!r} is declared as {due}",
                came,
                "Mend the algorithm's outgoing, or its layers (a server's payload_for and "
                "layers_down); {} sends nothing in a round.",
            )

    def _write(
        self, tensors: Mapping[str, Tensor], round: int, reference: Reference | None, precision: str
    ) -> WrittenFrame:
        return write_frame(
            tensors,
            sender=self._owner,
            round=round,
            fingerprint=self._fingerprint,
            reference=reference,
            prior=self._prior,
            precision=precision,
            run=self.run,
        )

    def arrays(self) -> Arrays:
        """All that is kept, by round: ``"17/bits"``; `restore` takes it back."""
        return {
            f"{round}/{name}": array
            for round, held in sorted(self._sent.items())
            for name, array in held.arrays().items()
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep exactly what :meth:`arrays` gave.

        Raises
        ------
        StateError
            If something in it is damaged or belongs elsewhere; the outbox is then as it
            was.
        """
        self._sent = restore_held(arrays, self._layers, f"the outbox of agent {self._owner}")
