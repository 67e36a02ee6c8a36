"""A command whose help lists its options panel by panel, as plain text that a pipe takes too."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperOption


class Panelled(TyperCommand):
    """typer itself has panels only in the boxes that rich draws.

    ``context`` and ``formatter`` are click's, or those of the copy that newer versions of typer carry.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then every panel in the order of its first option."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            title = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if isinstance(parameter, TyperOption) and parameter.rich_help_panel:
                title = parameter.rich_help_panel
            panels.setdefault(title, []).append(record)
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)
