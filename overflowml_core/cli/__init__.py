"""The command line, one file a command. Floor 3: sees everything, is seen by nobody."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its status."""
    from overflowml_core.cli.app import run

    run()
