"""What every test stands on: quiet libraries, one thread, and real data where there is some."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Flower and Ray read these when imported; OMP_NUM_THREADS is for processes that tests start.
for name, value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_HOME": str(Path(tempfile.gettempdir()) / "fedkd-tests-flwr-home"),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "100000",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(name, value)

REAL_DATA = ("mnist", "fashion-mnist", "cifar10")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that start Ray on one worker of pytest-xdist."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


def pytest_collection_finish() -> None:
    """Spare the garbage collector the modules that are loaded: a fifth of the processor time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_flush() -> Iterator[None]:
    """Wait for no disk: a flush takes milliseconds, and only a power cut would show that it is missing.

    Tests that count flushes or let them fail put their own in place; processes that tests start flush.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Give every test one torch thread, whatever the test before it set."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder with MNIST, Fashion-MNIST and CIFAR-10, or skip the test.

    With ``FEDKD_REQUIRE_DATA=1`` a missing file fails the test instead.
    """
    folder = os.environ.get("FEDKD_DATA_DIR")
    missing = [f"{name}.safetensors" for name in REAL_DATA]
    if folder:
        missing = [file for file in missing if not Path(folder, file).is_file()]
    if folder and not missing:
        return Path(folder).absolute()
    reason = (
        f"no {', '.join(missing)} in FEDKD_DATA_DIR ({folder or 'not set'}); "
        "`fedkd data` says how to get them"
    )
    if os.environ.get("FEDKD_REQUIRE_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
