"""Check the models that an experiment names, before any work."""

from __future__ import annotations

from collections.abc import Container, Sequence

from fedkd.data.federated import FederatedData
from fedkd.errors import FedkdError, Setting
from fedkd.experiment import Experiment
from fedkd.keys import kebab
from fedkd.training.architectures import architectures_of
from fedkd.training.needs import BATCH_NORM_NEEDS_TWO, is_trainable, smallest_batch


def check_models(
    experiment: Experiment, data: FederatedData, keys: Sequence[str], trained: Container[str]
) -> None:
    """Build every model that `keys` (such as ``"student"``) name, and try those of the user.

    Args:
        experiment: the run.
        data: its data.
        keys: of the experiment.
        trained: those of them whose models the run trains.

    Raises:
        FedkdError: there is no such model, it does not fit the images, it cannot be run so that its
            numbers are right, or it cannot be trained; the message names the key.
    """
    for key in keys:
        for name in str(getattr(experiment, key)).split(","):
            if name == "none" and key != "student":
                continue
            try:
                _check_model(experiment, data, name.strip(), key in trained)
            except FedkdError as error:
                raise FedkdError(Setting(kebab(key), name.strip()), f": {error}") from None


def _check_model(experiment: Experiment, data: FederatedData, name: str, is_trained: bool) -> None:
    architectures = architectures_of(data)
    if ":" in name:
        architectures.try_model(name, data.train)
        why = architectures.why_not_stacked(name)
        if why and architectures.plan(name, experiment.plan).stacked:
            plan = Setting("plan", experiment.plan)
            raise FedkdError("it must be run one by one, not by ", plan, f", as {why}")
    model = architectures.model(name)
    if is_trained and not is_trainable(model):
        raise FedkdError("it has no parameters to train (requires_grad), but would be trained")
    if is_trained and experiment.batch_size < smallest_batch(model):
        raise FedkdError(f"{BATCH_NORM_NEEDS_TWO}: ", Setting("batch-size", experiment.batch_size))
