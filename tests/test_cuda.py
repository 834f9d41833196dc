"""On a GPU the numbers are those of the CPU, within tolerance. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedkd

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.parametrize("strategy", ["FedMD", "DSFL", "FedAvg"])
@pytest.mark.parametrize("student", ["mlp-20", "mlp-20,resnet-8,lenet"])
def test_a_federation_on_cuda_equals_one_on_the_cpu(
    tmp_path: Path, strategy: str, student: str
) -> None:
    experiment = fedkd.Experiment(
        dataset="digits",
        public_size=97,
        public_labels=False,
        num_clients=3,
        student=student,
        teacher="none" if "," in student else "mlp-37",
        strategy=strategy,
        num_server_rounds=2,
        run_dir=str(tmp_path),
    )
    cpu, cuda = (fedkd.run(experiment.replace(device=device)) for device in ("cpu", "cuda"))
    assert (cuda.bytes_up, cuda.bytes_down) == (cpu.bytes_up, cpu.bytes_down)
    for here, there in zip(cpu.client_accuracy, cuda.client_accuracy, strict=True):
        assert there == pytest.approx(here, abs=0.03)


def test_the_central_baseline_on_cuda_equals_that_on_the_cpu() -> None:
    experiment = fedkd.Experiment(
        dataset="digits", teacher="mlp-37", student="mlp-20", local_epochs=3
    )
    cpu, cuda = (
        fedkd.central(experiment.replace(device=device), [0, 1, 2], save=False)
        for device in ("cpu", "cuda")
    )
    assert cuda.teacher_accuracies == pytest.approx(cpu.teacher_accuracies, abs=0.02)
    assert cuda.student_accuracies == pytest.approx(cpu.student_accuracies, abs=0.03)
