"""Check an experiment before any work, and before anything is written."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from inspect import signature

from fedkd.data.federated import FederatedData, federated_data
from fedkd.data.sources import reload
from fedkd.engines.resources import check_resources
from fedkd.errors import FedkdError, Setting, one_line
from fedkd.experiment import Experiment
from fedkd.federation.report_checks import means_width
from fedkd.knowledge import Weights
from fedkd.machine import resolve_device
from fedkd.phases import (
    Apply,
    Fit,
    MeanByClass,
    Procedure,
    import_path,
    resolve_procedure,
    resolve_term,
)
from fedkd.records.folder import RunFolder
from fedkd.registry import client_modules, strategy_of
from fedkd.strategy import DistillationStrategy
from fedkd.training.architectures import architectures_of
from fedkd.training.model_checks import check_models
from fedkd.training.needs import BATCH_NORM_NEEDS_TWO, smallest_batch
from fedkd.training.trials.terms import try_term
from fedkd.training.tuning import check_plan
from fedkd.user_code import GENERATED_PREFIX, is_importable

_PATIENCE_S = 5.0


def check(experiment: Experiment, *, is_new: bool = True) -> DistillationStrategy:
    """Return the strategy of an experiment, of which everything is checked that can be before any work.

    Args:
        experiment: the run.
        is_new: whether its folder must not exist yet.

    Raises:
        FedkdError: a key names something that does not exist, or keys contradict each other.
    """
    strategy = strategy_of(experiment)
    if is_new:
        RunFolder.check(experiment)
    _check_terms(experiment, strategy)
    _check_codec(experiment, strategy)
    _check_server_model(experiment, strategy)
    _check_engine(experiment)
    reload(experiment)
    data = federated_data(experiment)
    trained = _trained(strategy)
    check_models(experiment, data, ("student", "teacher", "server_model"), trained)
    _check_small_sets(experiment, data, trained)
    _check_averaged(experiment, strategy, data)
    _try_terms(experiment, strategy, data)
    _check_features(experiment, strategy, data)
    check_plan(experiment)
    per_round = experiment.public_per_round
    if per_round is not None and per_round > len(data.public):
        raise FedkdError(
            Setting("public-per-round", per_round),
            f": the public set has {len(data.public)} images",
        )
    return strategy


def default_name(experiment: Experiment, strategy: DistillationStrategy) -> str:
    """Return the name of a run without one: strategy, data set and seed."""
    words = (
        strategy.name().lower(),
        experiment.dataset_word,
        f"seed{experiment.seed}",
    )
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]", "", "-".join(words))


def _check_terms(experiment: Experiment, strategy: DistillationStrategy) -> None:
    """Refuse client code that does not exist, and terms that no client would run."""
    modules = client_modules(experiment, strategy)
    for module in modules:
        try:
            exists = module == "__main__" or find_spec(module) is not None
        except (ImportError, ValueError):
            exists = False
        if not exists:
            raise FedkdError(
                Setting("client-code", experiment.client_code), f": no module '{module}'"
            )
    for phase in [*strategy.phases(1), *strategy.phases(2)]:
        if isinstance(phase, Fit):
            for name in (*phase.private, *phase.public):
                _check_reach(experiment, name)
                needs = resolve_term(name, modules).needs
                if needs == "class-means" and name in phase.public:
                    raise FedkdError(
                        f"{strategy.name()}: {name} needs class means, which public samples do not "
                        "have; put it in private"
                    )
        if isinstance(phase, Apply):
            _check_reach(experiment, import_path(phase.procedure))
            _check_numbers(phase, resolve_procedure(import_path(phase.procedure), modules))


def _check_numbers(phase: Apply, procedure: Procedure) -> None:
    """Refuse numbers that a procedure does not take, and a lack of those that it needs."""
    try:
        signature(procedure.function).bind(None, **phase.numbers)
    except TypeError as error:
        raise FedkdError(f"numbers of {phase.name}: {phase.procedure}: {error}") from None


def _check_codec(experiment: Experiment, strategy: DistillationStrategy) -> None:
    """Refuse a codec that this installation lacks."""
    wires = strategy.wires(experiment)
    if any(wire.pack == "range" for wire in wires) and find_spec("constriction") is None:
        raise FedkdError(
            Setting("codec", experiment.codec),
            ": range coding needs constriction: pip install 'fedkd[codec]'",
        )


def _check_reach(experiment: Experiment, name: str) -> None:
    """Refuse client code that worker processes could not import."""
    module = name.rpartition(":")[0]
    in_process = experiment.engine == "cohort" and not experiment.num_workers
    if in_process or is_importable(module):
        return
    why = "is defined in the script being run: move it to a module, a file of its own"
    if module.startswith(GENERATED_PREFIX):
        why = "is defined in a file that has the same name as another module: rename the file"
    raise FedkdError(
        Setting("strategy", experiment.strategy), f": workers cannot import {name}, which {why}"
    )


def _trained(strategy: DistillationStrategy) -> set[str]:
    """Return the keys whose models a run trains for certain."""
    phases = [*strategy.phases(1), *strategy.phases(2)]
    trained = {phase.model for phase in phases if isinstance(phase, Fit)}
    # Required server models may be fixed; an optional one digests every new knowledge.
    return {*trained, *({"server_model"} if strategy.facts.server_model == "optional" else ())}


def _check_small_sets(experiment: Experiment, data: FederatedData, trained: set[str]) -> None:
    """Refuse shards of one image for models that cannot learn from one."""
    for key, name_of in (("student", experiment.student_of), ("teacher", experiment.teacher_of)):
        for k, shard in enumerate(data.shards):
            name = name_of(k)
            if len(shard) > 1 or key not in trained or name == "none":
                continue
            if smallest_batch(architectures_of(data).skeleton(name)) > 1:
                raise FedkdError(
                    Setting(key, name), f": client {k} has one image, and {BATCH_NORM_NEEDS_TWO}"
                )


def _try_terms(experiment: Experiment, strategy: DistillationStrategy, data: FederatedData) -> None:
    """Try every loss term that is not of this project."""
    modules = client_modules(experiment, strategy)
    name = experiment.student_of(0)
    model = architectures_of(data).skeleton(name)
    state = architectures_of(data).initial_state(name, experiment.seed)
    phases = [*strategy.phases(1), *strategy.phases(2)]
    outputs = {phase.of for phase in phases if isinstance(phase, MeanByClass)}
    numbers: dict[str, Mapping[str, float]] = {}
    for phase in phases:
        if isinstance(phase, Fit):
            numbers |= dict.fromkeys((*phase.private, *phase.public), phase.numbers)
    for each, values in numbers.items():
        term = resolve_term(each, modules)
        if term.function.__module__.partition(".")[0] not in ("fedkd", "strategies"):
            try_term(term, model, state, data.num_classes, values, outputs)


def _check_averaged(
    experiment: Experiment, strategy: DistillationStrategy, data: FederatedData
) -> None:
    """Refuse buffers that cannot be averaged, where weights are sent."""
    if strategy.uploads() is not Weights:
        return
    for name in {experiment.student_of(k) for k in range(experiment.architecture_period)}:
        state = architectures_of(data).initial_state(name, experiment.seed)
        for buffer, tensor in state.items():
            if tensor.is_complex() or not bool(tensor.isfinite().all()):
                raise FedkdError(
                    Setting("student", name),
                    f": {strategy.name()} averages all tensors, but '{buffer}' is not made of finite "
                    "real numbers: compute it in forward, or register it with another value",
                )


def _check_features(
    experiment: Experiment, strategy: DistillationStrategy, data: FederatedData
) -> None:
    """Refuse students whose features cannot be averaged with each other's."""
    for phase in strategy.phases(2):
        if isinstance(phase, MeanByClass):
            students = {experiment.student_of(k) for k in range(experiment.architecture_period)}
            widths = {name: means_width(phase, data, name) for name in sorted(students)}
            if len(set(widths.values())) > 1:
                listed = ", ".join(f"{name} has {width}" for name, width in widths.items())
                raise FedkdError(
                    Setting("student", experiment.student),
                    f": {strategy.name()} averages features, so all students need the same number "
                    f"({listed})",
                )


def _check_server_model(experiment: Experiment, strategy: DistillationStrategy) -> None:
    if experiment.server_model != "none" and strategy.facts.server_model == "none":
        raise FedkdError(
            Setting("server-model", experiment.server_model),
            f": {strategy.name()} has nothing to train it on; set server-model = 'none'",
        )


def _check_cluster(address: str) -> None:
    """Refuse an address at which nothing listens: Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE_S).close()
    except (OSError, OverflowError, ValueError) as error:
        raise FedkdError(
            Setting("ray-address", address),
            f": nothing answers there ({one_line(error)}); accepted: host:port of a running Ray "
            "cluster, or auto",
        ) from error


def _check_engine(experiment: Experiment) -> None:
    """Refuse devices and shares of this machine that no Flower client or worker could have."""
    device = resolve_device(experiment.device)
    if experiment.precision == "tf32" and device.type != "cuda":
        raise FedkdError(
            Setting("precision", experiment.precision),
            ": ",
            Setting("device", device),
            " does not support it; accepted there: float32, bfloat16",
        )
    if experiment.num_workers and experiment.device.startswith("cuda:"):
        raise FedkdError(
            Setting("device", experiment.device),
            " contradicts ",
            Setting("num-workers", experiment.num_workers),
            ": Ray assigns GPUs to the workers; set device = 'cuda'",
        )
    if experiment.ray_address is not None:
        _check_cluster(experiment.ray_address)
    if experiment.engine != "flower":
        return
    check_resources(experiment.num_clients, experiment.client_cpus, experiment.client_gpus)
    if experiment.device.startswith("cuda") and not experiment.client_gpus:
        raise FedkdError(
            Setting("device", experiment.device),
            " contradicts client-gpus = 0: a Flower client sees no GPU unless it has a "
            "share of one",
        )
