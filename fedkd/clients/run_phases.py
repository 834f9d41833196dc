"""Run the phases of an instruction in order, for all clients of a stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from time import monotonic

import numpy as np
import torch
from torch import Tensor

from fedkd.clients.answers import (
    answer_with_means,
    answer_with_soft_labels,
    answer_with_weights,
    encoded_answers,
)
from fedkd.clients.batch_streams import batch_streams_of
from fedkd.clients.evaluation import examine, measure_agreement, record_accuracy
from fedkd.clients.instructions import ClientReport
from fedkd.clients.memories import Memory, check_client_state
from fedkd.clients.stack import Stack, has_news, set_memory
from fedkd.clients.states import INITIAL
from fedkd.errors import FedkdError
from fedkd.knowledge import ClassMeans, SoftLabels, Weights
from fedkd.phases import (
    Apply,
    ClassifyByMeans,
    Fit,
    Load,
    LocalClient,
    MeanByClass,
    Phase,
    Predict,
    Reset,
    Role,
    check_received,
    import_path,
    resolve_procedure,
)
from fedkd.randomness import generator
from fedkd.training.architectures import architectures_of
from fedkd.training.optimizers import OptimizerSettings, stacked_values
from fedkd.training.profiling import TIMED, profiled, timed


def run_phases(stack: Stack) -> list[ClientReport]:
    """Return the reports of all clients, after running every phase of their instructions.

    Raises:
        FedkdError: a phase lacks knowledge that it needs, or the names in a client's state have changed.
    """
    names_before = [set(memory.get("own", {})) for memory in stack.memories]
    with profiled(stack.experiment.profile) as parts:
        for position, phase in enumerate(stack.first.phases):
            started = monotonic()
            _run_phase(stack, phase, position)
            stack.spend(phase.name, monotonic() - started)
        if stack.first.evaluate == "end":
            examine(stack)
        _check_state_names(names_before, stack.memories)
        encoded = encoded_answers(stack)
    for name, spent in parts.items():
        stack.spend(f"{TIMED} {name}", spent)
    round = stack.first.round
    return [
        ClientReport(k, len(shard), answer, metrics, dict(stack.seconds), each, round=round)
        for k, shard, answer, metrics, each in zip(
            stack.clients, stack.shards, stack.answers, stack.metrics, encoded, strict=True
        )
    ]


def _check_state_names(before: Sequence[set[str]], memories: Sequence[Memory]) -> None:
    """Raise an error if the names in a client's state changed: a state file has fixed names."""
    for names, memory in zip(before, memories, strict=True):
        now = set(memory.get("own", {}))
        if names and now and now != names:
            raise FedkdError(
                f"procedures set the state {', '.join(sorted(now))}, but it was "
                f"{', '.join(sorted(names))}: the names in a client's state must not change"
            )


def _run_phase(stack: Stack, phase: Phase, position: int) -> None:
    if isinstance(phase, Fit):
        _fit(stack, phase, position)
    elif isinstance(phase, Reset):
        _reset(stack)
    elif isinstance(phase, Load):
        _load(stack)
    elif isinstance(phase, Apply):
        _apply(stack, phase, position)
    elif isinstance(phase, ClassifyByMeans):
        stack.by_means = isinstance(stack.knowledge[0], ClassMeans)
    elif isinstance(phase, Predict):
        answer_with_soft_labels(stack, phase)
    elif isinstance(phase, MeanByClass):
        answer_with_means(stack, phase)
    else:
        answer_with_weights(stack)


def _reset(stack: Stack) -> None:
    name = stack.architecture("student")
    for row, experiment in enumerate(stack.experiments):
        initial = architectures_of(stack.data).initial_state(name, experiment.seed)
        stack.cohorts["student"].load(row, initial)
    stack.is_fresh = has_news(stack.first, INITIAL)


def _load(stack: Stack) -> None:
    name = stack.architecture("student")
    for row, knowledge in enumerate(stack.knowledge):
        if knowledge is None:
            continue
        if not isinstance(knowledge, Weights) or name not in knowledge.by_model:
            raise FedkdError(f"the load phase needs weights of {name}, but received none")
        received = knowledge.by_model[name].tensors
        stack.cohorts["student"].load(row, {n: t[0] for n, t in received.items()})


def _apply(stack: Stack, phase: Apply, position: int) -> None:
    procedure = resolve_procedure(import_path(phase.procedure), stack.experiment.client_modules)
    stream = f"{phase.name} {_occurrence(stack, position)}"
    load_public = cache(stack.data.public.whole)  # once for all clients, if any reads it
    for row, memory in enumerate(stack.memories):
        before, client = memory.get("own", {}), _local_client(stack, row, stream, load_public)
        received, generators = client.received, _global_generators()
        procedure(client, **phase.numbers)
        if not all(map(torch.equal, generators, _global_generators())):
            raise FedkdError(
                f"{procedure.import_path} draws from a global generator of PyTorch or numpy, which other "
                "clients share: use client.generator(purpose)"
            )
        if client.received is not received:
            check_received(procedure, client.received)
        check_client_state(procedure.import_path, client.state, before)
        if client.received is not None:
            stack.knowledge[row] = client.received
        set_memory(memory, "own", client.state)


def _global_generators() -> list[Tensor]:
    numpy_state = np.random.get_state(legacy=False)["state"]
    position = torch.tensor(numpy_state["pos"])
    return [torch.get_rng_state(), torch.as_tensor(numpy_state["key"].astype(np.int64)), position]


def _occurrence(stack: Stack, position: int) -> int:
    """Return how many earlier phases of the instruction have the same name."""
    name = stack.first.phases[position].name
    return sum(phase.name == name for phase in stack.first.phases[:position])


def _local_client(
    stack: Stack, row: int, stream: str, load_public: Callable[[], Tensor]
) -> LocalClient:
    train, shard, received = stack.data.train, stack.shards[row], stack.knowledge[row]
    rows = shard.to(train.device)
    name = stack.experiments[row].seed, stack.clients[row], stack.first.round, stream

    def predict(samples: Tensor, model: Role = "teacher") -> Tensor:
        return stack.role(model).only(row).predict(stack.data.public, samples)[0]

    return LocalClient(
        images=train.batch(rows),
        labels=stack.labels(row),
        load_public=load_public,
        received=received if isinstance(received, SoftLabels) else None,
        state=dict(stack.memories[row].get("own", {})),
        predict=predict,
        generator=lambda purpose: generator(*name, purpose),
    )


def _fit(stack: Stack, phase: Fit, position: int) -> None:
    batch_streams = batch_streams_of(stack, phase)
    if not batch_streams:
        return
    stream = f"{phase.name} {_occurrence(stack, position)}"
    key = "distill_epochs" if phase.public else "local_epochs"
    default = [getattr(experiment, key) for experiment in stack.experiments]
    fitted = stack.role(phase.model).fit(
        batch_streams,
        epochs=default if phase.epochs is None else phase.epochs,
        batch_size=stack.experiment.batch_size,
        optimizer=OptimizerSettings.from_experiments(stack.experiments),
        numbers={"tau": stacked_values(stack.experiments, "tau"), **phase.numbers},
        streams=[
            (experiment.seed, client, stack.first.round, stream)
            for experiment, client in zip(stack.experiments, stack.clients, strict=True)
        ],
    )
    stack.record(f"loss_{phase.name}", fitted.losses)
    stack.record(f"gradient_norm_{phase.name}", fitted.gradient_norms)
    distilled = any(batch_stream.teacher_logits is not None for batch_stream in batch_streams)
    if distilled:
        stack.states.digested = [stack.first.knowledge_round] * len(stack.instructions)
    if not _is_evaluated(stack, position):
        return
    with timed("evaluate"):
        if distilled:
            measure_agreement(stack, phase.model)
        if stack.first.evaluate != "end":
            record_accuracy(stack, f"accuracy_after_{phase.name}", phase.model)


def _is_evaluated(stack: Stack, position: int) -> bool:
    """Whether models are tested after the fit at a position."""
    if stack.first.evaluate != "last":
        return stack.first.evaluate in ("phases", "end")
    later = stack.first.phases[position + 1 :]
    return not any(isinstance(phase, Fit) and batch_streams_of(stack, phase) for phase in later)
