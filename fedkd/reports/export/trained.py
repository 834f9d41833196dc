"""Reads the trained models of a finished run from its folder.

The choice of a model never depends on an accuracy: that would be selection on the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedkd.clients.state_files import StateFiles
from fedkd.code_fingerprint import code_fingerprints
from fedkd.data.federated import FederatedData, federated_data
from fedkd.errors import FedkdError, Setting, nearest
from fedkd.experiment import Experiment
from fedkd.records.files import read_result, read_safetensors
from fedkd.records.folder import RunFolder
from fedkd.records.identity import changes
from fedkd.records.predictions import Tested
from fedkd.studies.central import MODELS
from fedkd.training.architectures import architectures_of
from fedkd.training.cohort import Cohort
from fedkd.training.parameters import State
from fedkd.training.plans import Plan
from fedkd.user_code import find_function

_RECORDED = {
    "teacher": "teacher_accuracies",
    "student-alone": "student_alone_accuracies",
    "student-distilled": "student_accuracies",
}
"""A central run's models, and where their accuracies by seed are in ``result.json``."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model of a finished run, on the CPU.

    Attributes:
        folder: the run's.
        kind: ``"federated"`` or ``"central"``.
        model: its role: student, teacher, student-alone or student-distilled.
        owner: its owner, such as ``"client 3"`` or ``"seed 0"``.
        chosen: why this owner was chosen.
        architecture: its name.
        teacher: the architecture of the teacher of the run or of this client, or ``"none"``.
        state: parameters and buffers by name.
        experiment: of the run, on the CPU, with the owner's seed.
        data: its data.
        rows: the training images whose labels its owner holds, int64 indices into ``data.train``.
        recorded: its accuracy in the run's result, 0..1.
        seeds: all seeds of a central run.
    """

    folder: RunFolder
    kind: str
    model: str
    owner: str
    chosen: str
    architecture: str
    teacher: str
    state: State
    experiment: Experiment
    data: FederatedData
    rows: Tensor
    recorded: float | None
    seeds: tuple[int, ...] = ()

    def module(self) -> nn.Module:
        """Return the model in evaluation mode.

        Raises:
            FedkdError: the architecture's parameters differ from the saved ones.
        """
        module = architectures_of(self.data).model(self.architecture).eval().requires_grad_(False)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
            raise FedkdError(
                f"{self.folder.path}: the {self.model} of {self.owner} has other parameters than "
                f"'{self.architecture}' has now; its code has changed since the run"
            )
        for name, tensor in tensors.items():  # tied ones occur once, as in the state
            tensor.copy_(self.state[name])
        return module

    def cohort(self) -> Cohort:
        """Return the model as the run tested it, in float32."""
        return Cohort.of(
            architectures_of(self.data).model(self.architecture), [self.state], Plan(stacked=False)
        )


def find(
    run_folder: str | Path,
    model: str | None = None,
    client: int | None = None,
    seed: int | None = None,
) -> Trained:
    """Return a trained model from the folder of a finished run.

    Args:
        run_folder: of a federated or a central run.
        model: of a federated run ``"student"`` (default) or the client's own ``"teacher"``; of a
            central run ``"student-distilled"`` (default), ``"student-alone"`` or ``"teacher"``.
        client: of a federated run; by default the first that took part in the closing
            exchange.
        seed: of a central run; by default the first.

    Raises:
        FedkdError: the run is not finished, has no such model, or its files cannot be read.
    """
    folder = RunFolder.existing(run_folder)
    result = read_result(folder.path)
    experiment = folder.experiment.replace(device="cpu")
    if "client_accuracy" in result:
        if seed is not None:
            raise FedkdError(
                Setting("seed", seed), ": a federated run has one seed; give a client instead"
            )
        return _unchanged(_of_client(folder, experiment, result, model or "student", client))
    if client is not None:
        raise FedkdError(f"client = {client}: a central run has no clients; give a seed instead")
    return _unchanged(_of_seed(folder, experiment, result, model or "student-distilled", seed))


def _unchanged(trained: Trained) -> Trained:
    """Return a model, of which neither the code nor the images have changed since it was trained.

    Raises:
        FedkdError: they have; the text names what.
    """
    recorded = trained.folder.identity
    named = [trained.architecture] if ":" in trained.architecture else []
    code = code_fingerprints(find_function(name, "student") for name in named)
    known = {name: value for name, value in recorded.get("code", {}).items() if name in code}
    before = {"data": recorded.get("data", {}), "code": known}
    now = {"data": trained.data.fingerprints, "code": code}
    if recorded and (changed := changes(before, now)):
        raise FedkdError(
            f"{trained.folder.path} cannot be exported, as it was trained with something else: "
            f"{'; '.join(changed)}; restore it"
        )
    return trained


def _check_model(model: str, accepted: Sequence[str]) -> None:
    if model not in accepted:
        raise FedkdError(
            f"model = '{model}'{nearest(model, accepted)}: this run keeps {', '.join(accepted)}"
        )


# --- A federated run ------------------------------------------------------------------------------


def _of_client(
    folder: RunFolder,
    experiment: Experiment,
    result: dict[str, Any],
    model: str,
    client: int | None,
) -> Trained:
    chosen = "chosen by the user"
    if client is None:
        client = next((k for k, a in enumerate(result["client_accuracy"]) if a is not None), None)
        if client is None:
            raise FedkdError(
                f"{folder.path}: no client of this run reported its accuracy; name one"
            )
        chosen = "the first client that took part in the closing exchange, regardless of accuracy"
    if not 0 <= client < experiment.num_clients:
        last = experiment.num_clients - 1
        raise FedkdError(f"client = {client}: this run has clients 0 to {last}")
    teacher = experiment.teacher_of(client) if _has_teachers(folder.path) else "none"
    _check_model(model, ["student"] if teacher == "none" else ["student", "teacher"])
    data = federated_data(experiment)
    return Trained(
        folder=folder,
        kind="federated",
        model=model,
        owner=f"client {client}",
        chosen=chosen,
        architecture=experiment.student_of(client) if model == "student" else teacher,
        teacher=teacher,
        state=_last_state(folder.path, experiment, result, client, model),
        experiment=experiment,
        data=data,
        rows=data.shards[client],
        recorded=result["client_accuracy"][client] if model == "student" else None,
    )


def _has_teachers(folder: Path) -> bool:
    """Whether a run's local teachers were trained: some strategies do not use them."""
    tested = Tested.load(folder)
    return tested is None or "teacher" in tested.models


def _last_state(
    folder: Path, experiment: Experiment, result: dict[str, Any], client: int, model: str
) -> State:
    """Return a client's model after the closing exchange, which counts as one more round."""
    closing = experiment.num_server_rounds + 1
    states = StateFiles(folder / "clients", experiment.architecture_period).load({client: closing})
    reason = result["dropped"].get(str(client))
    if reason is not None or not len(states):
        why = reason or f"{folder}/clients holds no state of this client"
        raise FedkdError(
            f"client = {client}: it took no part in the closing exchange ({why}); choose another"
        )
    return {name: tensor[0] for name, tensor in states.models[model].items()}


# --- A central run --------------------------------------------------------------------------------


def _of_seed(
    folder: RunFolder, experiment: Experiment, result: dict[str, Any], model: str, seed: int | None
) -> Trained:
    _check_model(model, list(_RECORDED))
    seeds: list[int] = result["seeds"]
    chosen = "chosen by the user"
    if seed is None:
        seed, chosen = seeds[0], "the first seed, regardless of accuracy"
    if seed not in seeds:
        raise FedkdError(
            Setting("seed", seed), f": this run has seeds {', '.join(map(str, seeds))}"
        )
    experiment = experiment.replace(seed=seed)
    data = federated_data(experiment)
    return Trained(
        folder=folder,
        kind="central",
        model=model,
        owner=f"seed {seed}",
        chosen=chosen,
        architecture=experiment.teacher if model == "teacher" else experiment.student,
        teacher=experiment.teacher,
        state=_saved_state(folder.path / MODELS, f"{model}/{seed}/"),
        experiment=experiment,
        data=data,
        rows=data.pooled,
        recorded=result[_RECORDED[model]][seeds.index(seed)],
        seeds=tuple(seeds),
    )


def _saved_state(path: Path, prefix: str) -> State:
    """Return the tensors of one model from a central run's file."""
    if not path.is_file():
        raise FedkdError(
            f"{path.parent} holds no {path.name}: the version of fedkd that made it did not save models; "
            "run `fedkd central` again"
        )
    tensors, _ = read_safetensors(path, prefix)
    state: State = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if not state:
        raise FedkdError(f"{path} holds nothing under {prefix}")
    return state
