"""The command line: the same keys as everywhere else, checked in the same place.

Results go to stdout, progress and errors to stderr. PyTorch is imported by the commands that need it, not
here. Their options are in `fedkd.cli.options`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import NoReturn

from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError

from fedkd.cli import looking, running
from fedkd.cli.usage import usage
from fedkd.engines.interrupts import Termination, on_sigterm
from fedkd.errors import FedkdError, printable
from fedkd.records.files import package_version

app = App(
    name="fedkd",
    help="Simulate federated distillation on Flower: students, teachers and soft labels.\n\n"
    "`fedkd COMMAND --help` lists a command's options, with ranges and defaults.",
    version=lambda: package_version("fedkd"),
    help_format="plaintext",
    default_parameter=Parameter(show_default=False),
    suppress_keyboard_interrupt=False,
)
for _command in (
    running.run,
    running.central,
    running.compare,
    running.sweep,
    looking.report,
    looking.list_,
    looking.diff,
    looking.export,
    looking.strategies,
    looking.cite,
    looking.check,
    looking.data,
):
    app.command(_command)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: with 2 for an error the user can fix, with 130 for Ctrl-C and with 143 for SIGTERM,
            each after one line on stderr. Any other exception is a bug in fedkd and comes with its
            traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without τ still gets its table
    tokens = sys.argv[1:] if argv is None else list(argv)
    with on_sigterm() as termination:
        _run(tokens, termination)


def _run(tokens: Sequence[str], termination: Termination) -> None:
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except FedkdError as error:
        _exit(str(error), 2)
    except CycloptsError as error:
        _exit(usage(error, app), 2)
    except KeyboardInterrupt as interrupt:
        # An interrupt inside exec() of a string (dataclasses make their methods so) marks the process:
        # `python -m` would then end by the signal instead of 130. Another exec() takes the mark away.
        exec("")
        _exit(str(interrupt) or "interrupted", 143 if termination.requested else 130)


def _exit(text: str, code: int) -> NoReturn:
    print(f"fedkd: {printable(' '.join(text.split()))}", file=sys.stderr)
    raise SystemExit(code)
