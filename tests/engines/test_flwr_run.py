"""``flwr run .`` as the README documents it: offline, in an own Flower home, judged by its status."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accident_models import FOLDER
from deployment_tools import BIN, copied_app, free_port
from paths import TOOLS

from fedkd.records import Run

PATIENCE_S = 200


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FEDKD_DATA_DIR": str(tmp_path / "data"),
        FOLDER: str(tmp_path),
        "PYTHONPATH": str(TOOLS),  # for the student that dies
    }


@pytest.fixture
def superlink(tmp_path: Path, environment: dict[str, str]) -> Iterator[None]:
    """Start the SuperLink that `flwr run` would start, so that its process is ours to end."""
    folder = tmp_path / "empty"
    folder.mkdir()
    port = environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]
    command: list[str | Path] = [
        BIN / "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess",
        "--control-api-address", f"127.0.0.1:{environment['FLWR_LOCAL_CONTROL_API_PORT']}",
        "--host", "127.0.0.1", "--port", port, "--database", tmp_path / "state.db",
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    log = (tmp_path / "superlink.log").open("wb")
    with (
        log,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log) as link,
    ):
        try:
            _wait_until_healthy(port)
            yield
        finally:
            link.terminate()
            link.wait(30)


def _wait_until_healthy(port: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    pytest.fail("the SuperLink did not start within a minute")


def _flwr(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [str(BIN / "flwr"), *arguments, "--format", "json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stdout, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("superlink")
def test_flwr_run_completes_though_a_client_process_dies(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    app = copied_app(tmp_path / "app")
    run_config = (
        "dataset='digits' num-clients=3 num-server-rounds=4 strategy='DSFL' public-size=97 batch-size=37 "
        # The plan is given: to measure one the server would run the model, which counts its fits.
        "student='mlp-20,accident_models:dying,mlp-20' plan='loop' "
        f"run-dir='{tmp_path / 'runs'}' name='from-flwr'"
    )
    started = _flwr(
        [
            "run", str(app),
            "--federation-config",
            "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2",
            "--run-config", run_config,
        ],
        environment,
    )  # fmt: skip
    assert started["success"], started
    assert _final_status(str(started["run-id"]), environment) == "finished:completed"
    run = Run.load(tmp_path / "runs" / "from-flwr")
    died = {"1": "client process died"}
    assert [row["dropped"] for row in run.rounds] == [{}, died, {}, {}]
    assert [len(row["answered"]) for row in run.rounds] == [3, 2, 3, 3]
    assert run.bytes_up == (4 * 3 - 1) * 97 * 10 * 4


def _final_status(run_id: str, environment: dict[str, str]) -> str:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        listed = _flwr(["list", "--run-id", run_id], environment)
        status = str(listed["runs"][0]["status"])
        if status.startswith("finished"):
            return status
        time.sleep(1)
    pytest.fail(f"the run did not finish within {PATIENCE_S} s: {status}")
