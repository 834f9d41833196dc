"""Check a strategy in federations of a few clients: what it asks for, keeps, sends and survives."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from fedkd.data.federated import federated_data
from fedkd.errors import FedkdError
from fedkd.federation.server import Replies, Server
from fedkd.knowledge import SoftLabels, Weights, tensors_of
from fedkd.knowledge.samples import check_samples
from fedkd.phases import MeanByClass, Predict
from fedkd.records.folder import RunFolder
from fedkd.strategy import DistillationStrategy
from fedkd.testing.bench import (
    FEW,
    ROUGH,
    ROUNDS,
    TEACHER,
    Bench,
    Done,
    Witness,
    honest,
    require_all,
    same,
)
from fedkd.testing.declarations import evaluate
from fedkd.testing.outcomes import NotApplicable, Wrong
from fedkd.training.architectures import architectures_of

APART = 5e-3
"""Mean difference that rounding may make between two ways to train the same clients: usually 1e-8, but
a quantised label changes by a whole step."""


# --- Asking ------------------------------------------------------------------------------------------


def request(bench: Bench) -> None:
    """The samples asked for are int64, distinct, of the public set, and the same when asked again."""
    if not any(isinstance(phase, Predict) for phase in bench.strategy.phases(2)):
        raise NotApplicable("no samples are asked for")
    for drawn in (FEW, None):
        server = bench.server(public_per_round=drawn)
        _check_request(Witness(bench.strategy).request(server), server)


def _check_request(asked: object, server: Server) -> None:
    try:
        check_samples(asked, server.num_public)
    except FedkdError as error:
        raise Wrong(
            f"request gives no public samples ({error}): return int64 [M], positions in the public set, "
            "such as server.draw() or server.everything()[condition]"
        ) from None


def samples(bench: Bench) -> None:
    """Knowledge of a round is of samples that were asked for, each with what clients answered for it."""
    if bench.strategy.uploads() is not SoftLabels:
        raise NotApplicable("no samples are asked for")
    done = require_all(bench.few)
    asked = done.witness.asked
    everything = bench.server(num_clients=3, **bench.other).num_public
    first, second = asked[1], asked[2]
    if len(first) and torch.equal(first, second) and len(first) < everything:
        raise Wrong(
            "request asks for the same samples in every round, though public-per-round draws others: "
            "return server.draw(), or a part of it"
        )
    if bench.strategy.facts.server_model == "required":
        raise NotApplicable("knowledge is what the server's model predicts for any sample")
    so_far = torch.empty(0, dtype=torch.int64)
    for update in done.updates:
        so_far = torch.cat([so_far, asked[update.round]])
        new = update.new
        if isinstance(new, SoftLabels) and not bool(torch.isin(new.samples, so_far).all()):
            raise Wrong(
                f"knowledge of round {update.round} is of samples that no client was asked for so far: "
                "give it the samples of the replies, SoftLabels.shared(values, labels.samples, space)"
            )
    _check_aligned(bench)


def _check_aligned(bench: Bench) -> None:
    """Check that knowledge follows clients that all agree, on another class for each sample."""
    server = bench.server(public_per_round=FEW)
    asked = bench.strategy.request(server)
    (space,) = {p.space for p in bench.strategy.phases(2) if isinstance(p, Predict)}
    classes = torch.arange(len(asked)) * 3 % server.num_classes
    agreed = torch.nn.functional.one_hot(classes, server.num_classes) * 3.0
    values = (agreed if space == "logits" else agreed.softmax(-1)).expand(3, -1, -1)
    targets = None if server.targets is None else server.targets[asked]
    labels = SoftLabels(values.clone(), space, asked, torch.tensor([0, 2, 3]), targets=targets)
    new = bench.strategy.update(Replies([0, 2, 3], labels), server)
    if new is None:
        return
    received = bench.strategy.personalise(new, 0, server)
    if not isinstance(received, SoftLabels):
        return
    is_asked = torch.isin(received.samples, asked)
    positions = torch.searchsorted(asked, received.samples[is_asked])
    if bool((received.values[:, is_asked].argmax(-1) != classes[positions]).any()):
        raise Wrong(
            "knowledge has for a sample what clients answered for another: values and samples have to "
            "be in the same order; index by labels.samples, not by position in the public set"
        )


# --- Rounds ------------------------------------------------------------------------------------------


def rounds(bench: Bench) -> None:
    """Three rounds run without a dropped client, the first of them without knowledge."""
    try:
        done = require_all(bench.usual)
    except (FedkdError, Wrong) as error:
        if _needs_a_teacher(bench):
            raise Wrong(
                f"{error}; with a local teacher it runs: declare local_teacher=True in facts"
            ) from error
        raise
    for row in done.rows:
        if not row["accepted"]:
            raise Wrong(f"round {row['round']} does not count, though all clients answered")


def _needs_a_teacher(bench: Bench) -> bool:
    """Whether a strategy that fails runs with a local teacher."""
    if bench.experiment.teacher != "none":
        return False
    try:
        require_all(bench.federate(teacher=TEACHER))
    except (FedkdError, Wrong):
        return False
    return True


def repeat(bench: Bench) -> None:
    """One strategy object runs twice with the same results."""
    again = bench.federate()
    if not same_run(bench.usual, again):
        raise Wrong(
            "a second run with the same strategy object gives something else: keep nothing on the "
            "object, its class or its module, only in server.state, and draw by server.generator"
        )


def same_run(one: Done, other: Done) -> bool:
    """Whether two runs gave the same records and knowledge, bit for bit."""
    rows = [
        [{n: v for n, v in row.items() if n not in ROUGH} for row in done.rows]
        for done in (one, other)
    ]
    news = [[update.new for update in done.updates] for done in (one, other)]
    return rows[0] == rows[1] and same(news[0], news[1])


class _Restarted(Witness):
    """Restarts in each round, from a strategy made of its settings and a state that was read back."""

    def _restart(self, server: Server) -> None:
        self.strategy = type(self.strategy)(**self.strategy.settings())
        server.state = restored(server.state)

    def request(self, server: Server) -> Tensor:
        self._restart(server)
        return super().request(server)

    def update(self, replies: Replies, server: Server) -> Any:
        self._restart(server)
        return super().update(replies, server)


def restored(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a server's state, saved and read back: tensors as safetensors, scalars as they are.

    Raises:
        Wrong: it holds something else.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor | bool | int | float | str):
            raise Wrong(
                f"server.state[{name!r}] is a {type(value).__name__}: keep tensors and scalars only, "
                "by names, so that it can be saved (make a list of numbers a tensor; leave out the "
                "name instead of None)"
            )
        if isinstance(value, Tensor) and value.requires_grad:
            raise Wrong(f"server.state[{name!r}] requires gradients: keep value.detach()")
    tensors = {n: t.contiguous() for n, t in state.items() if isinstance(t, Tensor)}
    others = {n: v for n, v in state.items() if not isinstance(v, Tensor)}
    return {**load(save(tensors)), **others}


def state(bench: Bench) -> None:
    """What the server keeps between rounds can be saved and read back."""
    for update in bench.usual.updates:
        restored(update.state)
    restarted = bench.federate(witness=_Restarted(bench.strategy))
    if not same_run(bench.usual, restarted):
        raise Wrong(
            "a run that is interrupted and resumed gives something else: all that lasts belongs in "
            "server.state, and nothing may depend on the order of its names"
        )


def plans(bench: Bench) -> None:
    """Clients give the same stacked and one by one, though their shards differ in size."""
    looped = require_all(bench.federate(plan="loop", num_server_rounds=2))
    for one, other in zip(bench.usual.updates, looped.updates, strict=False):
        if one.replies.knowledge is None or other.replies.knowledge is None:
            continue
        ours, theirs = tensors_of(one.replies.knowledge), tensors_of(other.replies.knowledge)
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            raise Wrong("stacked clients answer other samples than one by one: terms must be pure")
        for a, b in zip(ours, theirs, strict=True):
            gap = float((a.double() - b.double()).abs().sum()) / max(1, a.numel())
            size = float(a.double().abs().sum()) / max(1, a.numel())
            if not gap <= APART * max(1.0, size):
                raise Wrong(
                    f"stacked clients give other answers than one by one (by {gap:.2g} on average in "
                    f"round {one.round}): terms may not compare or average over a batch, which is padded"
                )


def both_engines(bench: Bench) -> None:
    """Three rounds in this process and on Ray give the same accuracies and bytes."""
    if not bench.engines:
        raise NotApplicable("engines are compared on demand, as Ray takes a while to start")
    from fedkd.engines import in_process, simulation

    runs = []
    for engine in (in_process, simulation):
        experiment = bench.named(evaluate_every=1)
        folder = RunFolder.create(experiment, "")
        rows: list[dict[str, Any]] = []
        with _importable(bench.strategy):
            engine.run(bench.strategy, experiment, folder, rows.append)
        runs.append(rows)
    for row, other in zip(*runs, strict=True):
        for name in row.keys() - set(ROUGH):
            if not _close(row[name], other.get(name)):
                raise Wrong(
                    f"{name} of round {row['round']} is {row[name]} in this process and "
                    f"{other.get(name)} on Ray, where clients are other processes: client code may "
                    "depend only on what it receives"
                )


@contextmanager
def _importable(strategy: DistillationStrategy) -> Iterator[None]:
    """Make a strategy's file importable in other processes, for its terms and procedures."""
    file = getattr(sys.modules.get(type(strategy).__module__), "__file__", None)
    folder = str(Path(file or "").absolute().parent)
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-4 * max(1.0, abs(one))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    return bool(one == other)


# --- Bytes -------------------------------------------------------------------------------------------


def measured_bytes(bench: Bench) -> None:
    """The bytes declared are those sent, for other numbers of samples, classes, clients and models."""
    # Many draws of few samples: what is sent must not grow with all that the server keeps.
    long = bench.federate(public_per_round=5, num_server_rounds=7)
    for done in (bench.usual, bench.few, long):
        require_all(done)
        for row in done.rows:
            _compare_bytes(bench, done, row, "up")
            if row["round"] > 1:  # before there is no knowledge to send
                _compare_bytes(bench, done, row, "down")


def _compare_bytes(bench: Bench, done: Done, row: Mapping[str, Any], way: str) -> None:
    formula: str = getattr(bench.strategy.facts, way)
    is_bound = formula.strip().startswith("<=")
    server = Server(done.experiment, federated_data(done.experiment), round=row["round"])
    drawn = len(server.draw())
    asked = len(done.witness.asked.get(row["round"], server.draw()))  # no phase may answer samples
    p = max(asked, drawn) if is_bound else asked
    sizes = symbols(bench, server, p)
    declared = evaluate(formula, way, {**sizes, **bench.strategy.settings()})
    for client, sent in zip(row["sampled"], row[f"bytes_{way}_by_client"], strict=True):
        if (sent > declared) if is_bound else (sent != declared):
            parts = ", ".join(f"{n} {b:,}" for n, b in row[f"bytes_{way}_by_tensor"].items())
            numbers = ", ".join(f"{n} = {v}" for n, v in sizes.items())
            raise Wrong(
                f"facts.{way} = '{formula}' is {declared:,.0f} bytes, and {sent:,} went {way} for client "
                f"{client} in round {row['round']} ({numbers}; all clients' {parts or 'nothing'}): "
                "correct the formula"
            )


def symbols(bench: Bench, server: Server, p: int) -> dict[str, int]:
    """Return the values of the symbols of a formula, where p samples are asked for."""
    experiment, data = server.experiment, server.data
    model = architectures_of(data).skeleton(experiment.student_of(0))
    head = getattr(model, "head", None)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "P": p,
        "C": server.num_classes,
        "K": server.num_clients,
        "S": sum(t.numel() * t.element_size() for t in state.values()),
        "D": getattr(head, "in_features", 0),
        "I": 0 if p == server.num_public else min(4 * p, -(-server.num_public // 8)),
    }


# --- What is declared of models and labels -------------------------------------------------------------


def public_labels(bench: Bench) -> None:
    """Public labels are needed if that is declared, and only then."""
    if bench.strategy.facts.public_labels:
        _refuses(bench, "public_labels", public_labels=False)
        return
    try:
        require_all(bench.federate(public_labels=False, num_server_rounds=2))
    except (FedkdError, Wrong) as error:
        raise Wrong(
            f"without public labels: {error}; declare public_labels=True in facts, or do without "
            "(labels.targets and server.targets are then None)"
        ) from error


def server_model(bench: Bench) -> None:
    """A model at the server is needed if that is declared, and otherwise does no harm."""
    declared = bench.strategy.facts.server_model
    if declared == "required":
        _refuses(bench, "server_model", server_model="none")
        server = bench.usual.witness.server
        if server is None or not server.trained:
            raise Wrong(
                "facts say server_model='required', and the server's model is never trained: call "
                "server.fit in update, or declare 'none' (or 'optional', if it only observes)"
            )
        return
    if declared == "none":
        raise NotApplicable("it has no server model")
    student = bench.experiment.student_of(0)
    done = require_all(bench.federate(server_model=student, num_server_rounds=2, evaluate_every=1))
    if done.rows[-1]["server_accuracy"] is None:
        raise Wrong(
            "facts say server_model='optional', and the observing model learns nothing: update has to "
            "return soft labels of K = 1, or declare 'none'"
        )


def local_teacher(bench: Bench) -> None:
    """A local teacher is needed if that is declared, and otherwise does no harm."""
    if bench.strategy.facts.local_teacher:
        _refuses(bench, "local_teacher", teacher="none")
        return
    try:
        require_all(bench.federate(teacher=TEACHER, num_server_rounds=2))
    except (FedkdError, Wrong) as error:
        raise Wrong(
            f"with a local teacher: {error}; name the model in Fit, Revisit and Predict (model='student' "
            "or 'teacher')"
        ) from error


def _refuses(bench: Bench, fact: str, **keys: Any) -> None:
    experiment = bench.experiment.replace(**keys)
    try:
        bench.strategy.check(experiment)
    except FedkdError:
        return
    raise Wrong(f"facts.{fact} is not checked: call super().check(experiment) in your check")


def mixed(bench: Bench) -> None:
    """Clients of two architectures take part side by side."""
    if bench.base is not None:
        raise NotApplicable("the given experiment sets the models")
    wide = any(isinstance(p, MeanByClass) and p.of == "features" for p in bench.strategy.phases(2))
    students = "mlp-84,lenet" if wide else "mlp-8,mlp-12"  # features of the same width
    parts = "what all models have in common"
    if bench.strategy.uploads() is Weights:
        parts = "each architecture by itself (every one of weights.by_model)"
    try:
        done = require_all(bench.federate(student=students, num_server_rounds=2))
    except (FedkdError, Wrong) as error:
        raise Wrong(f"with students {students}: {error}; combine {parts}") from error
    for update in done.updates:
        if isinstance(update.new, Weights) and set(update.new.by_model) != set(students.split(",")):
            raise Wrong(
                f"with students {students} knowledge has weights of {', '.join(update.new.by_model)} "
                f"only: combine {parts}"
            )


def codec(bench: Bench) -> None:
    """Soft labels may be encoded differently: half as precise, and only what changed."""
    if bench.strategy.uploads() is not SoftLabels:
        raise NotApplicable("it sends no soft labels to encode")
    wire = "float16+changed+deflate"
    try:
        require_all(bench.federate(codec=wire, num_server_rounds=2))
    except (FedkdError, Wrong) as error:
        raise Wrong(
            f"with codec = {wire}: {error}; what arrives is rounded, so compare no numbers exactly"
        ) from error


def partial(bench: Bench) -> None:
    """A few clients a round are enough, some of which join late."""
    rounds = ROUNDS + 1
    require_all(bench.federate(fraction_train=0.4, public_per_round=FEW, num_server_rounds=rounds))


def quorum(bench: Bench) -> None:
    """A round below the quorum changes nothing: earlier knowledge stays, and the next round runs."""

    def silent(number: int, client: int, message: Any, content: Any) -> Any:
        return None if number == 2 and client > 0 else honest(number, client, message, content)

    done = bench.federate(change=silent, quorum=2)
    if [update.round for update in done.updates] != [1, 3] or done.rows[1]["accepted"]:
        raise Wrong("a round below the quorum counts: leave the quorum to the base")
    before = bench.usual.updates[0].new
    if before is not None and done.rows[2]["knowledge_round"] != 1:
        raise Wrong("knowledge of a lost round is sent: return it from update only")
    require_all(done, [done.rows[0], done.rows[2]])
