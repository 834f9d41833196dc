"""Several federations at once in this process: their clients side by side, in one stack of models.

Every federation runs as it would alone, in a thread of its own, but only one thread runs at a time:
whoever has messages for its clients waits until all others have theirs. The clients of all then train
in one stack. So that they can, the experiments differ in `STACKABLE` keys and the seed alone (of the
same shards); a client's numbers are those of a run alone, within floating-point tolerance.
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
    """Run federations side by side.

    Returns:
        What ended each of them early, or `None`; the others have gone on.

    Raises:
        FedkdError: their clients cannot train side by side.
    """
    check_alike([each.experiment for each in federations])
    meeting = _Meeting(len(federations))
    with task_identity(), ThreadPoolExecutor(len(federations)) as threads:
        started = [threads.submit(_run, each, meeting, n) for n, each in enumerate(federations)]
        try:
            return [future.result() for future in started]
        except BaseException:  # Ctrl-C, or somebody's code that exits
            meeting.stop()
            raise


def check_alike(experiments: Sequence[Experiment]) -> None:
    """Refuse experiments whose clients cannot train side by side.

    Raises:
        FedkdError: says in what they may differ, or which engine they need.
    """
    keys = ", ".join(map(kebab, STACKABLE))
    if len({alike(experiment) for experiment in experiments}) > 1:
        raise FedkdError(f"side by side run experiments that differ in {keys} and seed alone")
    if experiments[0].engine != "cohort" or experiments[0].num_workers:
        raise FedkdError(
            "side by side run federations of engine = 'cohort' with num-workers = 0 alone"
        )


def alike(experiment: Experiment) -> Experiment:
    """Return what experiments that can run side by side have in common."""
    shared = experiment.at_default(*STACKABLE, "seed", "name", "run_dir")
    return shared.replace(partition_seed=experiment.split_seed)


def _run(prepared: PreparedRun, meeting: _Meeting, number: int) -> Exception | None:
    """Run one of the federations; its turn comes when all others wait."""
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
    """Where federations wait until all have messages for their clients.

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
        """Wait for all others, and return the answers of a federation's clients."""
        self._sent[number] = Delivery(experiment, store, contents)
        self._answer_if_all_are_here()
        self.turn.wait_for(lambda: number in self._answered or self._is_over)
        if self._is_over:
            raise FedkdError("the federations beside this one were stopped")
        found = self._answered.pop(number)
        if isinstance(found, BaseException):
            raise found
        return found

    def leave(self) -> None:
        """Be waited for no longer."""
        self._present -= 1
        self._answer_if_all_are_here()
        self.turn.notify_all()

    def stop(self) -> None:
        """Have all federations end as soon as the running one has answers or leaves."""
        self._is_over = True  # without the turn, which whoever runs holds until then

    def _answer_if_all_are_here(self) -> None:
        if self._is_over or not self._sent or len(self._sent) < self._present:
            return
        numbers = sorted(self._sent)  # not in the order in which the threads came
        sent = [self._sent.pop(number) for number in numbers]
        try:
            self._answered.update(zip(numbers, handle_together(sent), strict=True))
        except BaseException as error:  # nobody may wait for ever
            self._answered.update(dict.fromkeys(numbers, error))
        self.turn.notify_all()
