"""A digest of the code a process runs: clients and server must run the same.

Under ``flwr run`` the server app comes out of Flower's archive while Ray workers import from a working
directory, so that the two can differ without anybody noticing.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

from fedkd.experiment import Experiment


def digest(experiment: Experiment) -> str:
    """Return a digest of the Python sources of fedkd, strategies and the ``client-code`` modules."""
    return _digest(tuple(experiment.client_modules))


@lru_cache(maxsize=8)
def _digest(client_modules: tuple[str, ...]) -> str:
    found = blake2b(digest_size=8)
    for module in ("fedkd", "strategies", *client_modules):
        for path in _files(module):
            found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _files(module: str) -> list[Path]:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return []
    origin = Path(spec.origin)
    return sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
