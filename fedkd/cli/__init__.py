"""The command line; imported without what its commands need."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; see `fedkd.cli.commands`."""
    from fedkd.cli import commands

    commands.main(argv)
