"""Run several federations at once in this process, with their clients in one stack of models.

Every federation runs as it would alone, in a thread of its own, but only one thread runs at a time: a
federation that has messages for its clients waits until all others have theirs. The clients of all then
train in one stack. For that the experiments may differ only in `STACKABLE` keys and the seed (of the
same shards). A client's numbers are those of a run alone, within floating-point tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Condition

from flwr.app import RecordDict

from fedkd.clients.instructions import Failure
from fedkd.clients.stack import STACKABLE
from fedkd.clients.state_store import ResidentStates
from fedkd.engines.answering import Delivery, handle_together, store_of
from fedkd.engines.in_process import Clients
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.flower_internals.local_grid import LocalGrid, task_identity
from fedkd.keys import kebab
from fedkd.records.files import Row
from fedkd.records.folder import RunFolder
from fedkd.strategy import DistillationStrategy


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """A federation that is about to run.

    Attributes:
        strategy: the algorithm.
        experiment: the run, named.
        folder: where its records go.
        on_round: called with each round's record, once that is on disk.
    """

    strategy: DistillationStrategy
    experiment: Experiment
    folder: RunFolder
    on_round: Callable[[Row], None]


def run_side_by_side(federations: Sequence[PreparedRun]) -> list[Exception | None]:
    """Run federations side by side, and return what ended each early.

    Returns:
        For each the exception that ended it, or `None`; the others ran to their end.

    Raises:
        FedkdError: their clients cannot train side by side.
    """
    check_alike([each.experiment for each in federations])
    meeting = _Meeting(len(federations))
    with task_identity(), ThreadPoolExecutor(len(federations)) as threads:
        started = [threads.submit(_run, each, meeting, n) for n, each in enumerate(federations)]
        try:
            return [future.result() for future in started]
        except BaseException:  # Ctrl-C, or a user's code that exits
            meeting.stop()
            raise


def check_alike(experiments: Sequence[Experiment]) -> None:
    """Raise if the clients of these experiments cannot train side by side.

    Raises:
        FedkdError: names the keys in which they may differ, or the engine that they need.
    """
    keys = ", ".join(map(kebab, STACKABLE))
    if len({alike(experiment) for experiment in experiments}) > 1:
        raise FedkdError(f"experiments that run side by side may differ only in {keys} and seed")
    if experiments[0].engine != "cohort" or experiments[0].num_workers:
        raise FedkdError(
            "experiments that run side by side need engine = 'cohort' and num-workers = 0"
        )


def alike(experiment: Experiment) -> Experiment:
    """Return the part of an experiment that is equal in all that can run side by side with it."""
    shared = experiment.at_default(*STACKABLE, "seed", "name", "run_dir")
    return shared.replace(partition_seed=experiment.split_seed)


def _run(prepared: PreparedRun, meeting: _Meeting, number: int) -> Exception | None:
    """Run one of the federations and return what ended it early; it runs while all others wait."""
    experiment = prepared.experiment
    with meeting.turn:
        try:
            handle = partial(meeting.handle, number, experiment, store_of(experiment))
            clients = Clients(experiment, handle)
            grid = LocalGrid(clients.handle, num_clients=experiment.num_clients)
            prepared.strategy.open(grid, experiment, prepared.folder, prepared.on_round).run()
        except Exception as error:
            return error
        finally:
            meeting.leave()
    return None


class _Meeting:
    """Makes federations wait until all have messages for their clients.

    Attributes:
        turn: held by the one thread that runs.
    """

    def __init__(self, size: int) -> None:
        self.turn = Condition()
        self._present = size
        self._sent: dict[int, Delivery] = {}
        self._answered: dict[int, list[RecordDict | Failure] | BaseException] = {}
        self._is_over = False

    def handle(
        self,
        number: int,
        experiment: Experiment,
        store: ResidentStates,
        contents: Sequence[tuple[int, RecordDict]],
    ) -> list[RecordDict | Failure]:
        """Return the answers of a federation's clients, after waiting for all other federations."""
        self._sent[number] = Delivery(experiment, store, contents)
        self._answer_if_all_wait()
        self.turn.wait_for(lambda: number in self._answered or self._is_over)
        if self._is_over:
            raise FedkdError("the federations beside this one were stopped")
        answers = self._answered.pop(number)
        if isinstance(answers, BaseException):
            raise answers
        return answers

    def leave(self) -> None:
        """Take the running federation out: the others no longer wait for it."""
        self._present -= 1
        self._answer_if_all_wait()
        self.turn.notify_all()

    def stop(self) -> None:
        """End all federations as soon as the running one has answers or leaves."""
        self._is_over = True  # without the turn, which the running thread holds until then

    def _answer_if_all_wait(self) -> None:
        if self._is_over or not self._sent or len(self._sent) < self._present:
            return
        numbers = sorted(self._sent)  # not in the order in which the threads came
        deliveries = [self._sent.pop(number) for number in numbers]
        try:
            self._answered.update(zip(numbers, handle_together(deliveries), strict=True))
        except BaseException as error:  # no federation may wait for ever
            self._answered.update(dict.fromkeys(numbers, error))
        self.turn.notify_all()
