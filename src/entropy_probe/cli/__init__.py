"""The command line: parse and show. It holds no arithmetic."""

from entropy_probe.cli.app import main

__all__ = ["main"]
