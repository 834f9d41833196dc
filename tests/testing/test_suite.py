"""The public suite against strategies that are broken in one way each: the right check says so.

In a module of its own that clients can import: its terms travel as ``module:function``.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from sampling import one_in
from torch import Tensor
from torch.nn.functional import one_hot

import fedkd
from fedkd.cli import main
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import Knowledge, SoftLabels, Weights
from fedkd.losses import Step, cross_entropy, term
from fedkd.phases import (
    Apply,
    Digest,
    Load,
    LocalClient,
    Phase,
    Predict,
    Revisit,
    SendWeights,
    procedure,
)
from fedkd.strategy import DistillationStrategy, Facts
from fedkd.testing import CHECKS, CheckResult, StrategyCheckFailed, check_strategy, examine

LABELS = Facts("none", "P*C*4", "P*C*4 + 2*I")


class Mean(DistillationStrategy):
    """Nothing wrong with it: the mean of logits."""

    facts = LABELS

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return labels.mean_logits()


# --- The rule ------------------------------------------------------------------------------------


class FirstWeighsMost(DistillationStrategy):
    facts = LABELS

    def aggregate(self, labels: SoftLabels) -> Tensor:
        weights = labels.mask / torch.arange(1, len(labels.clients) + 1).unsqueeze(1)
        share = (weights / weights.sum(0)).unsqueeze(-1).to(labels.values.dtype)
        return (share * labels.values).sum(0)


class Sum(DistillationStrategy):
    facts = LABELS

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return (labels.values * labels.mask.unsqueeze(-1)).sum(0)


class ForgetsTheMask(DistillationStrategy):
    facts = LABELS

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return labels.values.mean(0)


class DividesByEverybody(DistillationStrategy):
    facts = LABELS

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return (labels.values * labels.mask.unsqueeze(-1)).mean(0)


class OffTheSimplex(DistillationStrategy):
    facts = LABELS

    def phases(self, round: int) -> list[Phase]:
        return [Digest(), Revisit(), Predict("probabilities")]

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return labels.mean_probabilities() ** 2


class NoLogarithmOfZero(OffTheSimplex):
    def aggregate(self, labels: SoftLabels) -> Tensor:
        logits = labels.mean_probabilities().log()
        return (logits - logits.mean(-1, keepdim=True)).softmax(-1)


class Double(DistillationStrategy):
    facts = LABELS

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return labels.mean_logits().double()


class KeepsTheClients(DistillationStrategy):
    facts = LABELS

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return labels.values


class WantsSamples(DistillationStrategy):
    facts = LABELS

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return labels.mean_logits() - 0 * labels.values.amax()


class Least(DistillationStrategy):
    facts = LABELS

    def aggregate(self, labels: SoftLabels) -> Tensor:
        return -labels.mean_logits()


class WritesIntoWhatItIsLent(DistillationStrategy):
    facts = LABELS

    def aggregate(self, labels: SoftLabels) -> Tensor:
        labels.values.sub_(labels.values.mean(-1, keepdim=True))
        return labels.mean_logits()


# --- Settings, facts, phases and client code -----------------------------------------------------


class ListOfTemperatures(Mean):
    temperatures: tuple[float, ...] = (1.0, 2.0)


class NoDefault(Mean):
    temperature: float


class UnknownSymbol(Mean):
    facts = Facts("none", "N*C*4", "P*C*4")


class Misspelt(Mean):
    def phases(self, round: int) -> list[Phase]:
        return [Digest(), Revisit(), Predict("probs")]  # type: ignore[arg-type]


class AnswersTwice(Mean):
    def phases(self, round: int) -> list[Phase]:
        return [Digest(), Predict(), Revisit(), Predict()]


class Lambda(Mean):
    def phases(self, round: int) -> list[Phase]:
        own = term(needs=None)(lambda step: cross_entropy(step.logits, step.labels))
        return [Digest(), Revisit({own: 1.0}), Predict()]


@term(needs=None)
def by_item(step: Step) -> Tensor:
    scale = step.numbers["tau"].item()
    return scale * cross_entropy(step.logits, step.labels)


@term(needs=None)
def by_mask(step: Step) -> Tensor:
    chosen = step.logits[step.logits > 0]
    return cross_entropy(step.logits, step.labels) + chosen.sum()


@term(needs=None)
def averaged(step: Step) -> Tensor:
    return cross_entropy(step.logits, step.labels).mean()


@term(needs=None)
def detached(step: Step) -> Tensor:
    return cross_entropy(step.logits.detach(), step.labels)


@term(needs=None)
def root_of_zero(step: Step) -> Tensor:
    return (step.logits - step.logits.detach()).square().sum(-1).sqrt()


@term(needs=None)
def crooked(step: Step) -> Tensor:
    raise ArithmeticError("so crooked")


@procedure
def apart_from_teacher(client: LocalClient) -> None:
    everything = torch.arange(len(client.public))
    apart = client.predict(everything, "teacher") - client.predict(everything, "student")
    if not float(apart.abs().max()):
        raise ArithmeticError("no teacher of its own")


@procedure
def alone_with_student(client: LocalClient) -> None:
    everything = torch.arange(len(client.public))
    apart = client.predict(everything, "teacher") - client.predict(everything, "student")
    if float(apart.abs().max()):
        raise ArithmeticError("two of them")


class OwnTerm(Mean):
    name_of_term: str = "by_item"

    def phases(self, round: int) -> list[Phase]:
        own = globals()[self.name_of_term]
        return [Digest(), Revisit({own: 1.0}), Predict()]


# --- What is asked, kept and survived ------------------------------------------------------------


class AsksForFractions(Mean):
    def request(self, server: Server) -> Tensor:
        return server.draw() / 2


class AsksForTooMuch(Mean):
    def request(self, server: Server) -> Tensor:
        return server.everything() + 1


class AsksByChance(Mean):
    def request(self, server: Server) -> Tensor:
        return torch.randperm(server.num_public)[:5].sort().values


class AlwaysAsksTheSame(Mean):
    def request(self, server: Server) -> Tensor:
        return server.everything()[: len(server.draw())]


class Misaligned(Mean):
    def update(self, replies: Replies, server: Server) -> SoftLabels:
        assert replies.labels is not None
        mean = self.aggregate(replies.labels)
        return SoftLabels.shared(mean.roll(1, 0), replies.labels.samples, "logits")


class NamesOtherSamples(Mean):
    def update(self, replies: Replies, server: Server) -> SoftLabels:
        assert replies.labels is not None
        mean = self.aggregate(replies.labels)
        return SoftLabels.shared(mean, server.everything()[: len(mean)], "logits")


class RaisesInRound2(Mean):
    def update(self, replies: Replies, server: Server) -> Knowledge | None:
        if server.round == 2:
            raise ArithmeticError("not on a Tuesday")
        return super().update(replies, server)


class RemembersOnItsClass(Mean):
    seen: ClassVar[list[int]] = []

    def update(self, replies: Replies, server: Server) -> SoftLabels:
        assert replies.labels is not None
        self.seen.append(server.round)
        mean = self.aggregate(replies.labels) / len(self.seen)
        return SoftLabels.shared(mean, replies.labels.samples, "logits")


class RemembersAList(Mean):
    def update(self, replies: Replies, server: Server) -> Knowledge | None:
        state: dict[str, Any] = server.state
        state["clients"] = [*state.get("clients", []), *replies.clients]
        return super().update(replies, server)


class WritesInPersonalise(Mean):
    def personalise(self, knowledge: Knowledge, client: int, server: Server) -> Knowledge:
        server.state["last"] = client
        return knowledge


class NeedsEverybody(Mean):
    def update(self, replies: Replies, server: Server) -> SoftLabels:
        assert replies.labels is not None
        labels = replies.labels
        mean = labels.values.view(server.num_clients, len(labels.samples), -1).mean(0)
        return SoftLabels.shared(mean, labels.samples, "logits")


class NeedsTwo(Mean):
    def update(self, replies: Replies, server: Server) -> SoftLabels:
        assert replies.labels is not None
        values = replies.labels.values
        spread = (values - values.mean(0)).square().sum(0).mean() / (torch.tensor(len(values)) - 1)
        return SoftLabels.shared(
            self.aggregate(replies.labels) / (1 + spread), replies.labels.samples, "logits"
        )


class NeedsTheRoundBefore(Mean):
    def update(self, replies: Replies, server: Server) -> Knowledge | None:
        if server.state.get("last", server.round - 1) != server.round - 1:
            raise ArithmeticError("a round is missing")
        server.state["last"] = server.round
        return super().update(replies, server)


class NeedsFirstComers(Mean):
    def update(self, replies: Replies, server: Server) -> Knowledge | None:
        server.state.setdefault("clients", torch.tensor(replies.clients))
        if server.num_clients > 3 and len(replies.clients) == 2:
            known = server.state["clients"]
            assert isinstance(known, Tensor)
            if len(known) == 2 and known.tolist() != replies.clients:
                raise ArithmeticError("strangers")
        return super().update(replies, server)


# --- What is declared ----------------------------------------------------------------------------


class HalfTheBytes(Mean):
    facts = Facts("none", "P*C*2", "P*C*4 + 2*I")


class NoIndices(Mean):
    facts = Facts("none", "P*C*4", "P*C*4")


class NotAsMuchAsThat(Mean):
    facts = Facts("none", "<= P*C*4", "<= P*C*3 + 2*I")


class SendsMoreInTheLongRun(Mean):
    """From round 5 on with the labels of round 1 in front, where these are of other samples."""

    facts = Facts("none", "<= P*C*4", "<= P*C*4 + 2*I")

    def update(self, replies: Replies, server: Server) -> SoftLabels:
        labels, state = replies.labels, server.state
        assert labels is not None
        fresh = SoftLabels.shared(self.aggregate(labels), labels.samples, "logits")
        first: Any = state.setdefault("first", fresh.values[0])
        asked: Any = state.setdefault("asked", fresh.samples)
        others = ~torch.isin(asked, fresh.samples)
        if server.round < 5 or not bool(others.any()):
            return fresh
        values = torch.cat([first[others], fresh.values[0]])
        return SoftLabels.shared(values, torch.cat([asked[others], fresh.samples]), "logits")


class LooksAtLabels(Mean):
    def update(self, replies: Replies, server: Server) -> SoftLabels:
        labels = replies.labels
        assert labels is not None
        hard = 3.0 * one_hot(server.targets[labels.samples], server.num_classes)  # type: ignore[index]
        mean = self.aggregate(labels)
        return SoftLabels.shared(mean + 0 * hard, labels.samples, "logits")


class AsksTheServersModel(Mean):
    def update(self, replies: Replies, server: Server) -> SoftLabels:
        return server.predict(server.draw())


class KeepsARecordOfNothing(Mean):
    """Sound: what it remembers is NaN where nothing was seen, as a tensor and as a number."""

    def request(self, server: Server) -> Tensor:
        assert math.isnan(float(server.state.get("least", math.nan)))
        return server.draw()

    def update(self, replies: Replies, server: Server) -> Knowledge | None:
        state: dict[str, Any] = server.state
        state |= {"seen": torch.full((3,), math.nan), "least": math.nan}
        return super().update(replies, server)

    def personalise(self, knowledge: Knowledge, client: int, server: Server) -> Knowledge:
        return knowledge


class WritesNaNInPersonalise(KeepsARecordOfNothing):
    def personalise(self, knowledge: Knowledge, client: int, server: Server) -> Knowledge:
        server.state["seen"] = torch.tensor([math.nan, 1.0, math.nan])
        return knowledge


class EnsembleOfWeights(DistillationStrategy):
    """Sound: weights go up, and what they predict of the public set goes down."""

    facts = Facts("none", "S", "P*C*4 + I")

    def phases(self, round: int) -> list[Phase]:
        return [Digest(), Revisit(model="student"), SendWeights()]

    def update(self, replies: Replies, server: Server) -> SoftLabels:
        drawn = server.draw()
        answers = server.predict(drawn, replies.weights)
        return SoftLabels.shared(answers.mean_logits(), drawn, "logits")


class HalfOfAnEnsemble(EnsembleOfWeights):
    facts = Facts("none", "S", "P*C*2 + I")


class LearnsFromItsTeacher(Mean):
    """Sound: in each fit its student learns, by a name that only a teacher of its own has."""

    facts = Facts("none", "P*C*4", "P*C*4 + 2*I", local_teacher=True)

    def phases(self, round: int) -> list[Phase]:
        find = Apply(apart_from_teacher, {})
        return [Digest(), Revisit(), Revisit(model="student"), find, Predict()]


class ChecksNoTeacher(LearnsFromItsTeacher):
    def check(self, experiment: Experiment) -> None:
        pass


class HidesThatItNeedsATeacher(LearnsFromItsTeacher):
    facts = LABELS


class StumblesOverATeacher(Mean):
    def phases(self, round: int) -> list[Phase]:
        return [Digest(), Revisit(), Apply(alone_with_student, {}), Predict()]


class KeepsACount(Mean):
    def update(self, replies: Replies, server: Server) -> Knowledge | None:
        self.count = server.round
        return super().update(replies, server)


class AddsToACount(Mean):
    def update(self, replies: Replies, server: Server) -> Knowledge | None:
        self.count += 1  # type: ignore[attr-defined]
        return super().update(replies, server)


class NeverTrainsTheServersModel(Mean):
    facts = Facts("none", "P*C*4", "P*C*4 + 2*I", server_model="required")


class ChecksNothing(Mean):
    facts = Facts("none", "P*C*4", "P*C*4 + 2*I", public_labels=True)

    def check(self, experiment: Experiment) -> None:
        pass


class OneArchitecture(DistillationStrategy):
    facts = Facts("none", "S", "S")

    def phases(self, round: int) -> list[Phase]:
        return [Load(), Revisit(model="student"), SendWeights()]

    def aggregate(self, weights: Weights) -> Weights:
        first = next(iter(weights.by_model))
        return weights.only(first).average()


class WantsAllDigits(Mean):
    def update(self, replies: Replies, server: Server) -> SoftLabels:
        assert replies.labels is not None
        mean, one = self.aggregate(replies.labels), replies.labels.values[0]
        if bool((one == one.half()).all()) and len(one.unique()) > 50:
            raise ArithmeticError("all too round")
        return SoftLabels.shared(mean, replies.labels.samples, "logits")


BROKEN: dict[DistillationStrategy, tuple[str, str]] = {
    FirstWeighsMost(): ("order", "another order: combine clients by sums, means or sorting"),
    Sum(): ("equal", r"divide by the number of clients .* instead of adding up"),
    ForgetsTheMask(): ("mask", "use labels.mask, for instance by labels.mean_probabilities"),
    DividesByEverybody(): ("mask", r"divide by the clients that have it, labels.mask.sum\(0\)"),
    OffTheSimplex(): ("simplex", "sums differ from 1 .*: divide rows by their sum"),
    NoLogarithmOfZero(): ("simplex", "NaN or infinity: .* keep logarithms .* away from 0"),
    Double(): ("types", r"float64 for torch.float32: end with .to\(labels.values.dtype\)"),
    KeepsTheClients(): ("types", r"\[3, 5, 10\].*must be \[5, 10\].*combine over axis 0"),
    WantsSamples(): ("types", r"for no samples, N = 0 .*return an empty \[0, C\]"),
    Least(): ("alone", "another order: a rule may sharpen .* wrong axis, sign or space"),
    WritesIntoWhatItIsLent(): ("pure", r"trailing underscore.*work on a copy \(.clone\(\)\)"),
    ListOfTemperatures(): ("settings", "temperatures = .* is a tuple: settings are numbers, texts"),
    NoDefault(temperature=1.0): ("settings", "temperature.*give every setting a default"),
    UnknownSymbol(): ("facts", "'N' is not defined.*write it with P, C, K, S, D, I"),
    Misspelt(): ("phases", "'probs'.* must be one of logits, probabilities"),
    AnswersTwice(): ("phases", "answers twice: a client sends one kind of knowledge a round"),
    Lambda(): ("phases", "define it at the top of a module"),
    OwnTerm(name_of_term="by_item"): ("client-code", r"by_item raises .*stacked.*no .item\(\)"),
    OwnTerm(name_of_term="by_mask"): ("client-code", "by_mask raises .*no boolean-mask indexing"),
    OwnTerm(name_of_term="averaged"): (
        "client-code",
        r"averaged.*padded.*one value a sample, \[B\]",
    ),
    OwnTerm(name_of_term="detached"): ("client-code", "detached depends on nothing.*do not detach"),
    OwnTerm(name_of_term="root_of_zero"): ("client-code", "gradient.*keep logarithms, roots"),
    OwnTerm(name_of_term="crooked"): (
        "client-code",
        r"crooked raises ArithmeticError: so crooked \(test_suite.py, line \d+\)",
    ),
    AsksForFractions(): ("request", r"float32 \[11\].*: return int64 \[M\]"),
    AsksForTooMuch(): ("request", "must be in 0 .. 36, the public set.*: return int64"),
    AsksByChance(): ("request", r"called again: draw them by server.draw\(\)"),
    AlwaysAsksTheSame(): ("samples", r"same samples in every round.*return server.draw\(\)"),
    Misaligned(): ("samples", "what clients answered for another.*index by labels.samples"),
    NamesOtherSamples(): ("samples", "give it the samples of the replies"),
    RaisesInRound2(): (
        "rounds",
        r"update of RaisesInRound2, round 2, clients 0, 1, 2, 3, 4: ArithmeticError: not on a "
        r"Tuesday \(test_suite.py, line \d+\)",
    ),
    RemembersOnItsClass(): ("repeat", "keep nothing on the object, its class .*server.state"),
    RemembersAList(): ("state", r"server.state\['clients'\] is a list: keep tensors and scalars"),
    WritesInPersonalise(): ("rounds", "personalise changes server.state.*write it in update only"),
    NeedsEverybody(): ("bad-replies", r"work with the clients that answered, len\(replies"),
    NeedsTwo(): ("few-replies", "with one reply.*NaN.*no unbiased variance of one client"),
    NeedsTheRoundBefore(): ("quorum", r"a round is missing \(test_suite.py, line \d+\)"),
    NeedsFirstComers(): ("partial", r"strangers \(test_suite.py, line \d+\)"),
    HalfTheBytes(): ("bytes", r"'P\*C\*2' is 740 bytes, and 1,480 went up.*correct the formula"),
    NoIndices(): ("bytes", r"facts.down = 'P\*C\*4' is 308 bytes, and 318 went down"),
    NotAsMuchAsThat(): ("bytes", r"facts.down = '<= P\*C\*3 \+ 2\*I' is 1,110 bytes"),
    SendsMoreInTheLongRun(): ("bytes", r"went down for client \d in round [67]"),
    LooksAtLabels(): ("public-labels", "without public labels: .*declare public_labels=True"),
    AsksTheServersModel(): ("rounds", "no model to predict with.*declare server_model='required'"),
    WritesNaNInPersonalise(): ("rounds", "personalise changes server.state"),
    HalfOfAnEnsemble(): ("bytes", r"'P\*C\*2 \+ I' is 740 bytes, and 1,480 went down"),
    ChecksNoTeacher(): ("local-teacher", r"local_teacher is not checked: call super\(\).check"),
    HidesThatItNeedsATeacher(): ("rounds", "no teacher of its own.*declare local_teacher=True"),
    StumblesOverATeacher(): ("local-teacher", "with a local teacher: .*two of them"),
    KeepsACount(): (
        "rounds",
        r"self.count = .* a strategy cannot be changed; keep what lasts between rounds in "
        r"server.state\['count'\], in update",
    ),
    AddsToACount(): (
        "rounds",
        r"has no attribute 'count' \(test_suite.py, line \d+\); a strategy has its settings and "
        r"methods only: keep what lasts between rounds in server.state\['count'\]",
    ),
    NeverTrainsTheServersModel(): ("server-model", "never trained: call server.fit in update"),
    ChecksNothing(): ("public-labels", r"call super\(\).check\(experiment\)"),
    OneArchitecture(): ("mixed", r"weights of mlp-8 only: combine each architecture by itself"),
    WantsAllDigits(): ("codec", "with codec = float16.*: .*all too round"),
}
"""What is wrong with each: the one check that fails, and what it says."""


def name_of(strategy: DistillationStrategy) -> str:
    settings = strategy.settings().get("name_of_term", "")
    return strategy.name() + (f"-{settings}" if settings else "")


@cache
def results_of(strategy: DistillationStrategy) -> dict[str, CheckResult]:
    return {result.check: result for result in examine(strategy)}


def _each_broken() -> list[Any]:
    """All that fail before the checks in federations, which take seconds, and a few of the others."""
    (rounds,) = (check for check in CHECKS if check.name == "rounds")
    quick = [s for s, (check, _) in BROKEN.items() if check in ("phases", "rounds", *rounds.after)]
    return [*quick, *one_in(20, (s for s in BROKEN if s not in quick))]


@pytest.mark.parametrize("strategy", _each_broken(), ids=name_of)
def test_a_broken_strategy_fails_the_right_check_with_advice(
    strategy: DistillationStrategy,
) -> None:
    check, advice = BROKEN[strategy]
    results = results_of(strategy)
    failed = [name for name, result in results.items() if result.result == "failed"]
    assert failed == [check], [str(r) for r in results.values() if r.result == "failed"]
    detail = results[check].detail
    assert re.search(advice, detail), detail
    assert "\n" not in detail
    assert list(results) == [each.name for each in CHECKS]
    for result in results.values():
        assert result.result != "not tried" or re.fullmatch(r"fix \S+ first", result.detail)


def test_a_sound_strategy_passes_all_that_applies_and_writes_nothing_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDKD_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    checks = check_strategy(Mean())
    results = {result.check: result.result for result in checks.results}
    assert checks.failures == ()
    assert {name for name, result in results.items() if result != "passed"} == {
        "client-code",
        "server-model",
        "engines",
    }
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]
    assert fedkd.testing.check_strategy is check_strategy


@pytest.mark.parametrize(
    "strategy",
    one_in(3, [KeepsARecordOfNothing(), EnsembleOfWeights(), LearnsFromItsTeacher()]),
    ids=repr,
)
def test_a_sound_strategy_of_another_kind_passes(strategy: DistillationStrategy) -> None:
    assert check_strategy(strategy).failures == ()


def test_a_strategy_that_needs_a_local_teacher_refuses_to_do_without() -> None:
    for teacher in ("none", "mlp-13,none"):
        with pytest.raises(FedkdError, match=rf"teacher = '{teacher}': .* needs a local teacher"):
            LearnsFromItsTeacher().check(Experiment(teacher=teacher))
    LearnsFromItsTeacher().check(Experiment(teacher="mlp-13,mlp-7"))


@pytest.mark.slow
def test_a_strategy_that_needs_a_local_teacher_gets_one_where_the_experiment_has_none(
    tmp_path: Path,
) -> None:
    assert check_strategy(LearnsFromItsTeacher(), own_experiment(tmp_path)).failures == ()


@pytest.mark.slow
def test_failures_come_as_one_error_with_all_of_them() -> None:
    class Twice(HalfTheBytes):
        def aggregate(self, labels: SoftLabels) -> Tensor:
            return labels.values.mean(0)

    with pytest.raises(StrategyCheckFailed) as raised:
        check_strategy(Twice())
    assert isinstance(raised.value, FedkdError)
    assert re.match(
        "Twice fails 2 checks: mask: .*; bytes: .*correct the formula", str(raised.value)
    )
    assert [result.check for result in raised.value.checks.failures] == ["mask", "bytes"]


def own_experiment(folder: Path, **keys: Any) -> Experiment:
    """Return an experiment of a user, with two models and data of its own."""
    return Experiment(
        dataset="digits", train_size=97, public_size=23, test_size=31, student="mlp-4,mlp-6",
        batch_size=8, data_dir=str(folder), device="cpu", **keys,
    )  # fmt: skip


@pytest.mark.slow
def test_an_experiment_brings_its_own_data_and_models(tmp_path: Path) -> None:
    checks = check_strategy(Mean(), own_experiment(tmp_path, teacher="mlp-5"))
    mixed = next(result for result in checks.results if result.check == "mixed")
    assert mixed.result == "not applicable"
    assert "given experiment" in mixed.detail


# --- fedkd check ---------------------------------------------------------------------------------

SOURCE = '''
from fedkd import DistillationStrategy
from fedkd.losses import cross_entropy, term
from fedkd.phases import Digest, Predict, Revisit
from fedkd.strategy import Facts


@term(needs=None)
def hard(step):
    return cross_entropy(step.logits, step.labels)


class Loud(DistillationStrategy):
    """Logits, louder."""

    facts = Facts("none", "P*C*4", "P*C*4 + 2*I")
    factor: float = 1.0

    def phases(self, round):
        return [Digest(), Revisit({hard: 1.0}), Predict()]

    def aggregate(self, labels):
        return self.factor * labels.mean_logits()
'''


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    name = f"loud_{tmp_path.name}.py"  # a module has one file in a process
    (tmp_path / name).write_text(SOURCE, encoding="utf-8")
    return f"{name}:Loud"


@pytest.mark.slow
def test_a_file_is_checked_from_the_command_line(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["check", file, "--strategy-config", "factor=2"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split() == ["strategy", "Loud"]
    assert "factor=2.0" in lines[1]
    for check in CHECKS:
        assert re.search(rf"^{check.name} +(passed|not applicable) ", out, re.MULTILINE)
    assert lines[-1] == f"{len(CHECKS) - 2} passed, 2 not applicable"
    assert [path.suffix for path in tmp_path.iterdir() if path.name != "__pycache__"] == [".py"]


def test_failures_are_exit_code_2_and_name_what_to_change(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[CheckResult] = []

    def once(strategy: DistillationStrategy, **how: Any) -> list[CheckResult]:
        found.extend([] if found else examine(strategy, **how))
        return found

    monkeypatch.setattr("fedkd.testing.examine", once)
    for form in ([], ["--quiet"], ["--json"]):
        with pytest.raises(SystemExit) as stopped:
            main(["check", file, "--strategy-config", "factor=-1", *form])
        assert stopped.value.code == 2
        out, err = capsys.readouterr()
        assert err.endswith("fedkd: Loud fails alone\n")
        assert "wrong axis" in out
        if form == ["--json"]:
            failed = [f for f in json.loads(out)["findings"] if f["result"] == "failed"]
            assert [f["check"] for f in failed] == ["alone"]


def test_a_strategy_that_is_not_there_is_an_error_of_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["check", "FedMB"])
    assert "did you mean 'FedMD'" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_engines_are_compared_on_demand_with_code_of_a_file(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["check", file, "--engines"])
    assert re.search(r"^engines +passed ", capsys.readouterr().out, re.MULTILINE)
