"""A user's own function by ``module:function``."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

from fedkd.errors import FedkdError, nearest


def find_function(reference: str, what: str) -> Callable[..., Any]:
    """Import the function that `reference` (``module:function``) names.

    Args:
        reference: the module is looked for in the working directory as well, where a console script
            does not search by itself.
        what: what the function is wanted for, such as ``"model"``.

    Raises:
        FedkdError: the module does not import, or has no such function.
    """
    module_name, _, function_name = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise FedkdError(
            f"{what} '{reference}': cannot import '{module_name}' ({in_one_line(error)})"
        ) from error
    try:
        function = attrgetter(function_name)(module)
    except AttributeError:
        function = None
    if not callable(function):
        raise FedkdError(
            f"{what} '{reference}': '{module_name}' has no function '{function_name}'"
            f"{nearest(function_name, vars(module))}"
        )
    return cast(Callable[..., Any], function)


_NOT_THE_USERS = (str(Path(__file__).parent), sysconfig.get_paths()["stdlib"])


def place(error: BaseException) -> str:
    """Return where in a user's code an exception came from, as `` (file.py, line 12)``.

    The innermost frame that is neither of fedkd nor of an installed package; nothing if there is none.
    """
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        ours = frame.filename.startswith(_NOT_THE_USERS) or "site-packages" in frame.filename
        if not ours and not frame.filename.startswith("<"):
            found = f" ({Path(frame.filename).name}, line {frame.lineno})"
    return found


def in_one_line(error: BaseException) -> str:
    """Return an exception's type and text without line breaks, 300 characters at most."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
