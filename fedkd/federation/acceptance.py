"""Which good replies of a round count: those of which something can be made, alone and together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy, deepcopy

from torch import Tensor

from fedkd.clients.instructions import ClientReport
from fedkd.errors import FedkdError
from fedkd.federation.algorithm import CheckedAlgorithm, Proposal
from fedkd.federation.exchange import Exchange
from fedkd.federation.outliers import farthest_first, least
from fedkd.federation.server import Replies, Server
from fedkd.federation.trial import Trial, pieces
from fedkd.knowledge import ClassMeans, Knowledge, SoftLabels, Weights
from fedkd.knowledge.kinds import in_words
from fedkd.phases import Phase
from fedkd.training.architectures import architectures_of

RECEIVERS = 8
"""The most clients whose share of new knowledge is tried, where each receives another."""


class Acceptance:
    """Leaves out replies with which the knowledge of a round would have no use.

    Args:
        algorithm: the algorithm.
        server: of the federation.
    """

    def __init__(self, algorithm: CheckedAlgorithm, server: Server) -> None:
        self._algorithm = algorithm
        self._server = server
        self._trial = Trial(server.experiment, server.data)

    def trial_seconds(self) -> float:
        """Return the seconds that trials took since this was last asked."""
        spent, self._trial.seconds = self._trial.seconds, 0.0
        return spent

    def leave_out_useless(self, exchange: Exchange) -> None:
        """Drop each client whose answer alone gives numbers that are not finite."""
        answers = {r.client: r.answer for r in exchange.reports if r.answer is not None}
        weights = {k: a for k, a in answers.items() if isinstance(a, Weights)}
        learnt = [(k, a) for k, a in answers.items() if not isinstance(a, Weights)]
        phases = self._algorithm.phases(self._server.round + 1)
        predicts = self._trial.predicts([*weights.values()])
        teaches = self._trial.teaches(learnt, phases, steps=1, margin=1)
        for client, works in zip(weights, predicts, strict=True):
            if not works:
                what = "sends weights with which predictions are not finite"
                exchange.leave_out(client, what)
        for (client, answer), works in zip(learnt, teaches, strict=True):
            if not works:
                what = (
                    f"sends {in_words(type(answer))} with which losses or gradients are not finite"
                )
                exchange.leave_out(client, what)

    def update(self, exchange: Exchange, previous: Knowledge | None) -> Proposal:
        """Return the update by the good replies, after dropping those with which it does not work.

        If together they give knowledge that clients cannot learn from, the fewest replies that explain
        it are dropped, in the order of `farthest_first`. If it takes half of them or more, none is: then
        training itself has diverged.

        Args:
            exchange: of the round, its replies sorted.
            previous: the knowledge with which its clients began.
        """
        phases = self._algorithm.phases(self._server.round + 1)
        proposal = self._proposed(exchange.reports)
        if self._is_sound(proposal, exchange.reports, phases):
            return proposal
        self._algorithm.withdraw(proposal)
        reports = exchange.reports
        suspects = self._suspects(reports, previous)

        def without(count: int) -> list[ClientReport]:
            return [report for report in reports if report.client not in suspects[:count]]

        def works(count: int) -> bool:
            tried = self._proposed(without(count))
            sound = self._is_sound(tried, without(count), phases)
            self._algorithm.withdraw(tried)
            return sound

        count = least(min(len(suspects), (len(reports) - 1) // 2), works) or 0
        for client in suspects[:count]:
            kind = _kind_of(reports, client)
            exchange.leave_out(
                client, f"sends {kind} with which those of all together are not finite in use"
            )
        return self._proposed(exchange.reports)

    def _suspects(self, reports: Sequence[ClientReport], previous: Knowledge | None) -> list[int]:
        """Return the clients that may be at fault, the first first."""
        data, seed = self._server.data, self._server.experiment.seed

        def start(name: str) -> Mapping[str, Tensor]:
            if isinstance(previous, Weights) and name in previous.by_model:
                return {n: t[0] for n, t in previous.by_model[name].tensors.items()}
            return architectures_of(data).initial_state(name, seed)

        answered = [report for report in reports if report.answer is not None]
        return farthest_first(answered, start) if answered else []

    def _proposed(self, reports: Sequence[ClientReport]) -> Proposal:
        return self._algorithm.propose(_replies(reports, self._server.targets))

    def _is_sound(
        self, proposal: Proposal, reports: Sequence[ClientReport], phases: Sequence[Phase]
    ) -> bool:
        """Whether new knowledge, and the server's model, have a use."""
        model = proposal.server.model
        if proposal.fault is not None:
            return False
        if model is not None and not all(bool(t.isfinite().all()) for t in model.state(0).values()):
            return False
        return all(self._trial.teaches(list(self._received(proposal, reports, phases)), phases))

    def _received(
        self, proposal: Proposal, reports: Sequence[ClientReport], phases: Sequence[Phase]
    ) -> Iterator[tuple[int, Knowledge]]:
        """Yield what some clients would receive: one of each architecture, or more where it differs."""
        new, experiment = proposal.knowledge, self._server.experiment
        if new is None:
            return
        # What a strategy writes into its state here, in a trial, is not kept.
        server = copy(proposal.server)
        server.state = deepcopy(proposal.server.state)
        seen: dict[tuple[str, str, int], Knowledge] = {}
        for report in reports:
            student = experiment.student_of(report.client)
            if isinstance(new, Weights) and student not in new.by_model:
                continue
            try:
                received = self._algorithm.personalise(new, report.client, phases, server)
            except FedkdError:  # a fault of the strategy is told when this is to be sent
                continue
            key = (student, experiment.teacher_of(report.client), id(received))
            if key not in seen:
                seen[key] = received
                yield from ((report.client, piece) for piece in pieces(received))
            if len(seen) >= RECEIVERS:
                return


def _kind_of(reports: Sequence[ClientReport], client: int) -> str:
    (answer,) = (report.answer for report in reports if report.client == client)
    return in_words(None if answer is None else type(answer))


def _replies(reports: Sequence[ClientReport], targets: Tensor | None) -> Replies:
    answers = [report.answer for report in reports]
    labels = [answer for answer in answers if isinstance(answer, SoftLabels)]
    means = [answer for answer in answers if isinstance(answer, ClassMeans)]
    weights = [answer for answer in answers if isinstance(answer, Weights)]
    return Replies(
        [report.client for report in reports],
        SoftLabels.stack(labels, targets) if labels else None,
        ClassMeans.stack(means) if means else None,
        Weights.stack(weights) if weights else None,
    )
