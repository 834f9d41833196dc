"""Previews of runs, baselines, comparisons, sweeps and checks, as facts."""

from __future__ import annotations

from collections.abc import Sequence

from fedkd.data.federated import FederatedData, federated_data
from fedkd.experiment import Experiment
from fedkd.keys import kebab
from fedkd.losses import effective_weights
from fedkd.phases import Fit
from fedkd.strategy import DistillationStrategy
from fedkd.training.architectures import architectures_of
from fedkd.training.models import num_parameters
from fedkd.training.tuning import choose_plans


def run_preview(experiment: Experiment, strategy: DistillationStrategy) -> dict[str, str]:
    """Return what a federation is about to do."""
    settings = ", ".join(f"{kebab(key)}={value}" for key, value in strategy.settings().items())
    return {
        **compare_preview(experiment),
        **_whose_accuracy(experiment, strategy),
        "strategy": f"{strategy.name()}{f' ({settings})' if settings else ''}, "
        f"{experiment.num_server_rounds} rounds",
        "loss": _losses(experiment, strategy, federated_data(experiment)),
        "plan": "; ".join(map(str, choose_plans(experiment))),
    }


def _whose_accuracy(experiment: Experiment, strategy: DistillationStrategy) -> dict[str, str]:
    """Return what a local teacher does; accuracies after revisit are then the teacher's."""
    if experiment.teacher == "none":
        return {}
    fits = [phase for phase in strategy.phases(2) if isinstance(phase, Fit)]
    if not any(phase.model == "teacher" for phase in fits):
        return {"teacher": f"not used by {strategy.name()}"}
    return {"teacher": "revisits the private data: accuracies after revisit are the teacher's"}


def compare_preview(experiment: Experiment) -> dict[str, str]:
    """Return what is the same for all methods of a comparison."""
    data = federated_data(experiment)
    sizes = [len(shard) for shard in data.shards]
    drawn = experiment.clients_per_round
    each = "" if drawn == len(sizes) else f", {drawn} drawn each round"
    return {
        "data": _images(experiment, len(data.train), len(data.test)),
        "public": _public(experiment, data),
        "clients": f"{len(sizes)} ({experiment.partition}), {min(sizes):,} to {max(sizes):,} private "
        f"images each{each}",
        "models": "; ".join(
            f"{kebab(key)} {_models(getattr(experiment, key), data)}"
            for key in ("student", "teacher", "server_model")
        ),
        "training": _training(experiment),
        "engine": f"{experiment.engine} on {data.train.device}",
        "loss": _weights(experiment, data),
    }


def central_preview(experiment: Experiment, seeds: Sequence[int]) -> dict[str, str]:
    """Return what the central baseline is about to do."""
    data = federated_data(experiment)
    return {
        "data": _images(experiment, len(data.pooled), len(data.test)),
        "models": f"teacher {_models(experiment.teacher_of(0), data)}; "
        f"student {_models(experiment.student_of(0), data)}",
        "training": f"{_training(experiment)}; epochs: teacher {experiment.local_epochs}, "
        f"students {experiment.distill_epochs}",
        "loss": f"student distilled {_weights(experiment, data)}; teacher and student alone CE",
        "seeds": ", ".join(str(seed) for seed in seeds),
        "device": str(data.train.device),
    }


def sweep_preview(
    experiment: Experiment, what: str, seeds: Sequence[int], folds: int, of: str
) -> dict[str, str]:
    """Return what a sweep is about to do."""
    held_out = experiment.varied(fold=f"1/{folds}")
    shared = central_preview(held_out, seeds) if of == "central" else compare_preview(held_out)
    strategy = {} if of == "central" else {"strategy": experiment.strategy}
    return {
        **{name: text for name, text in shared.items() if name != "seeds"},
        **strategy,
        "sweep": what,
    }


def check_preview(strategy: DistillationStrategy) -> dict[str, str]:
    """Return what is about to be checked."""
    settings = ", ".join(f"{kebab(key)}={value}" for key, value in strategy.settings().items())
    return {"strategy": strategy.name(), "settings": settings or "none"}


def _weights(experiment: Experiment, data: FederatedData) -> str:
    return effective_weights(
        experiment.alpha, experiment.tau, experiment.kl_reduction, data.num_classes
    )


def _images(experiment: Experiment, train: int, test: int) -> str:
    held = "test images" if experiment.fold == "none" else f"of them held out ({experiment.fold})"
    return f"{experiment.dataset}, {train:,} training and {test:,} {held}"


def _public(experiment: Experiment, data: FederatedData) -> str:
    where = "of the training images" if experiment.public == "train" else f"of {experiment.public}"
    labels = "without labels" if data.public.labels is None else "with labels"
    per_round = experiment.public_per_round
    return f"{len(data.public):,} {where}, {labels}" + (
        f", {per_round:,} drawn each round" if per_round else ""
    )


def _models(names: str, data: FederatedData) -> str:
    return ", ".join(
        name
        if name == "none"
        else f"{name} ({num_parameters(architectures_of(data).model(name)):,} parameters)"
        for name in dict.fromkeys(part.strip() for part in names.split(","))
    )


def _losses(experiment: Experiment, strategy: DistillationStrategy, data: FederatedData) -> str:
    """Return the loss of each training phase of a usual round as text."""
    values = {"alpha": experiment.alpha, "1-alpha": 1 - experiment.alpha}
    losses = []
    for phase in strategy.phases(2):
        if not isinstance(phase, Fit):
            continue
        terms = {**phase.private, **phase.public}
        text = " + ".join(
            _weighted(name, values[w] if isinstance(w, str) else w, phase, experiment)
            for name, w in terms.items()
        ).removeprefix("1 × ")
        if terms == {"kl": "alpha", "ce": "1-alpha"}:
            text = _weights(experiment, data)
        if "ce" in phase.public and data.public.labels is None:
            text += " of private images"
        losses.append(f"{phase.name} {text}")
    return "; ".join(losses)


def _weighted(name: str, weight: float, phase: Fit, experiment: Experiment) -> str:
    """Return a term with its weight as text; that of the soft term includes τ²."""
    if name != "kl":
        return f"{weight:g} × {name.upper() if name == 'ce' else name.rpartition(':')[2]}"
    tau = phase.numbers.get("tau", experiment.tau)
    return f"{weight:g}·{tau:g}² = {weight * tau**2:g} × KL"


def _training(experiment: Experiment) -> str:
    return f"{experiment.optimizer} at {experiment.learning_rate:g}, batches of {experiment.batch_size}"
