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
from fedkd.references import is_importable


def digest(experiment: Experiment) -> str:
    """Return a digest of the Python sources of fedkd, strategies and the ``client-code`` modules.

    A script that is run, and a file with another module's name, are only known to this process.
    """
    modules = [module for module in experiment.client_modules if is_importable(module)]
    origins = [_origin(module) for module in ("fedkd", "strategies", *modules)]
    # A user's file may be changed and read again while a notebook runs.
    return _digest(tuple((path, path.stat().st_mtime_ns) for path in origins if path is not None))


@lru_cache(maxsize=8)
def _digest(origins: tuple[tuple[Path, int], ...]) -> str:
    found = blake2b(digest_size=8)
    for origin, _ in origins:
        for path in _files(origin):
            found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _origin(module: str) -> Path | None:
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # the package of a dotted name
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _files(origin: Path) -> list[Path]:
    return sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
