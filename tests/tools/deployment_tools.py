"""A federation on this machine as `docs/deploy.md` builds it: a SuperLink and SuperNodes, TLS and keys.

What is started here is ended here, by its process id.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paths import ROOT

BIN = Path(sys.executable).parent
PATIENCE_S = 400


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def documented(heading: str) -> str:
    """Return the commands under a heading of `docs/deploy.md`."""
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return "\n".join(re.findall(r"^    (.*)$", section, re.MULTILINE))


def copied_app(folder: Path) -> Path:
    """Copy what `flwr run .` takes of the checkout, so that nobody edits it while it runs."""
    for package in ("fedkd", "strategies"):
        shutil.copytree(ROOT / package, folder / package)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / file)
    return folder


def make_keys(folder: Path) -> None:
    """Make a certificate authority, the SuperLink's certificate and the keys of three nodes."""
    folder.mkdir()
    script = documented("Certificates and keys").replace("node-0 node-1", "node-0 node-1 node-2")
    made = subprocess.run(
        ["bash", "-euc", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr


@dataclass
class Node:
    """A process and the file that it logs to."""

    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self.log_file.read_text(errors="replace")

    def wait(self) -> None:
        """Wait until it is connected to the SuperLink."""
        wait_until(lambda: "SuperNode ID" in self.log, "the node is connected", 60)

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)


@dataclass
class Deployment:
    """A SuperLink with TLS and node authentication, and what it takes to reach it.

    Attributes:
        folder: where everything lies; ``keys`` holds the certificates and the keys of nodes.
        port: of the SuperLink.
        stack: ends what was started.
        ids: Flower's node ids of registered nodes by their key's name.
    """

    folder: Path
    port: int
    stack: ExitStack
    ids: dict[str, str] = field(default_factory=dict)

    def environment(self, owner: str) -> dict[str, str]:
        """Return the environment of one party: each has a Flower home of its own."""
        return {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "FLWR_HOME": str(self.folder / owner / "flwr"),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "FEDKD_DATA_DIR": str(self.folder / "data"),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, owner: str, command: Sequence[str | Path]) -> Node:
        """Start a process of one party in a folder of its own; it is ended with the deployment."""
        folder = self.folder / owner
        folder.mkdir()
        log = self.stack.enter_context((folder / "log").open("wb"))
        process = subprocess.Popen(
            command, cwd=folder, env=self.environment(owner), stdout=log, stderr=log
        )
        self.stack.callback(_end, process)
        return Node(process, folder / "log")

    def node(self, name: str, config: str, ca: Path | None = None, key: Path | None = None) -> Node:
        """Start a SuperNode with a key that is called like it, unless other files are given."""
        keys = self.folder / "keys"
        command: list[str | Path] = [
            BIN / "flower-supernode", "--superlink", f"127.0.0.1:{self.port}",
            "--root-certificates", ca or keys / "ca.crt",
            "--auth-supernode-private-key", key or keys / name,
            "--port", str(free_port()), "--max-retries", "1", "--node-config", config,
        ]  # fmt: skip
        return self.start(name, command)

    def flwr(self, *arguments: str | Path) -> dict[str, Any]:
        """Call Flower's command line tool as whoever runs the federation."""
        done = self._flwr(*arguments, "--format", "json")
        assert done.stdout, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        assert answer.get("success", True), answer
        return answer

    def _flwr(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "flwr"), *map(str, arguments)],
            env=self.environment("operator"),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def register(self, name: str) -> None:
        """Let the owner of a key in."""
        public = self.folder / "keys" / f"{name}.pub"
        self.ids[name] = str(self.flwr("supernode", "register", public, "federation")["node-id"])

    def statuses(self) -> dict[str, str]:
        """Return the status of every node that the SuperLink knows, by id."""
        listed = self.flwr("supernode", "list", "federation")["nodes"]
        return {str(node["node-id"]): str(node["status"]) for node in listed}

    def said(self, run_id: str) -> str:
        """Return the log of a run, as `flwr log` shows it."""
        return self._flwr("log", run_id, "federation", "--show").stdout

    def log(self, owner: str) -> str:
        """Return what a party's process has said so far."""
        return (self.folder / owner / "log").read_text(errors="replace")

    def submit(self, app: Path, **keys: Any) -> str:
        """Start a run and return its id."""
        config = " ".join(f"{name.replace('_', '-')}={_toml(v)}" for name, v in keys.items())
        return str(self.flwr("run", app, "federation", "--run-config", config)["run-id"])

    def finished(self, run_id: str) -> dict[str, Any]:
        """Wait for a run to end, and return what Flower lists of it."""
        done = re.compile(rf"Finished task \d+ of run {run_id}")
        wait_until(lambda: done.search(self.log("superlink")) is not None, f"run {run_id} ended")
        (run,) = self.flwr("list", "federation", "--run-id", run_id)["runs"]
        return dict(run)


def wait_until(so: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait for something to become so, looking at files: `flwr` itself takes seconds of work."""
    end = time.monotonic() + patience_s
    while not so():
        assert time.monotonic() < end, f"waited {patience_s:g} s, and it is not so that {what}"
        time.sleep(0.2)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(str(value) if isinstance(value, Path) else value)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and make it after a while."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


@contextmanager
def deployed(folder: Path) -> Iterator[Deployment]:
    """Start a SuperLink with certificates and keys made as `docs/deploy.md` says."""
    keys = folder / "keys"
    make_keys(keys)
    with ExitStack() as stack:
        deployment = Deployment(folder, free_port(), stack)
        home = folder / "operator" / "flwr"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "federation"\n\n[superlink.federation]\n'
            f'address = "127.0.0.1:{deployment.port}"\nroot-certificates = "{keys}/ca.crt"\n'
        )
        link = deployment.start("superlink", [
            BIN / "flower-superlink", "--host", "127.0.0.1", "--port", str(deployment.port),
            "--ssl-certfile", keys / "superlink.crt", "--ssl-keyfile", keys / "superlink.key",
            "--ssl-ca-certfile", keys / "ca.crt", "--enable-supernode-auth",
            "--database", "state.db", "--disable-runtime-dependency-installation",
        ])  # fmt: skip
        wait_until(lambda: "Uvicorn running" in link.log, "the SuperLink is up", 60)
        yield deployment
