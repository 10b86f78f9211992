"""Handover of simulated agents: their states and models, for the run record and back.

A worker of Flower's simulation may run on another machine of a Ray cluster; only the
strategy's process knows that it sees the record. So what is to be in there comes with
an agent's answer, and what a resumed run begins with goes with its first message.
"""

from collections.abc import Callable, Collection, Mapping
from logging import getLogger
from pathlib import Path
from typing import final

from flwr.app import Array

from flower_mcepl.agents import agent_file, save_state
from flower_mcepl.agents.agent import best_file
from flower_mcepl.errors import AnswerError, RecordError, StateError
from flower_mcepl.exchange.parcels import Answer
from flower_mcepl.files.atomic import replace_file
from flower_mcepl.messages.envelope import raw_array
from flower_mcepl.record.layout import EXPORTS
from flower_mcepl.runs.generation import Generation
from flower_mcepl.runs.simulated import in_simulation
from flower_mcepl.runs.store import StateStore

logger = getLogger("flwr")


@final
class Handover:
    """States and models of a run's simulated agents, in the run record.

    Parameters
    ----------
    folder : Path
        Where they lie, `RunRecord.agents_dir`.
    run : str
        Of which run a state must be.
    """

    def __init__(self, folder: Path, *, run: str) -> None:
        self._folder, self._run = folder, run
        self._store = StateStore(folder, log=logger.warning)

    def state_before(self, round: int, agent: int) -> Array | None:
        """Newest state that an agent had before a round, as it is sent; None if none.

        Raises
        ------
        StateError
            See `StateStore.load`.
        """
        generation = self._store.load(agent, run=self._run, before=round)
        return None if generation is None else raw_array(generation.encode(), Array)

    def keep(
        self,
        answers: Mapping[int, Answer[Array]],
        *,
        closing: bool,
        done_by: Callable[[int], Collection[int]] = lambda agent: (),
    ) -> None:
        """Write what came with the answers; a final state is that of a closing answer.

        ``done_by`` says which rounds of an agent checkpoints go back to, where these
        are not its two newest ones.

        Raises
        ------
        RecordError
            If a file cannot be written.
        """
        try:
            for agent, answer in answers.items():
                if answer.state:
                    final = closing and answer.late_of is None
                    self._keep(agent, answer, final=final, checkpoints=done_by(agent))
        except OSError as error:
            raise RecordError(f"cannot write into the run record: {error}") from error

    def _keep(
        self, agent: int, answer: Answer[Array], *, final: bool, checkpoints: Collection[int]
    ) -> None:
        generation = Generation.decode(answer.state)
        if not final:
            self._store.save(generation, checkpoints=checkpoints)
            return
        save_state(generation.state, self._folder / agent_file(agent))
        if generation.best is not None:
            save_state(generation.best, self._folder / best_file(agent))
        for ending, data in answer.exported.items():
            replace_file((self._folder / agent_file(agent)).with_suffix(ending), data)


def check_handed(answer: Answer[Array], *, agent: int, run: str) -> None:
    """Refuse what an agent must not hand over.

    Raises
    ------
    AnswerError
        If it is of another agent or run, or not what it should be; or if it comes from
        a device, which keeps its state to itself.
    """
    if not (answer.state or answer.exported):
        return
    if not in_simulation():
        raise AnswerError(
            f"a device keeps its state to itself, and agent {agent} sent one. Use the same "
            "release of flower-mcepl on server and devices."
        )
    try:
        generation = Generation.decode(answer.state)
    except StateError as error:
        raise AnswerError(f"agent {agent} handed over no readable state: {error}") from error
    if (generation.agent, generation.run) != (agent, run):
        raise AnswerError(
            f"agent {agent} of run {run} must hand over a state of its own; got one of agent "
            f"{generation.agent} of run {generation.run}"
        )
    if others := answer.exported.keys() - set(EXPORTS.values()):
        raise AnswerError(
            f"an exported model is a file ending in {', '.join(EXPORTS.values())}; agent {agent} "
            f"handed over {', '.join(sorted(others))!s:.100}"
        )
