"""What is ours inside a Python kernel: results of more kinds, and surroundings that change.

Loaded by the kernel as an IPython extension. Nothing of it is in the caller's namespace.
"""

from __future__ import annotations

from typing import Any

from IPython.core.formatters import BaseFormatter
from traitlets import ObjectName, Unicode

from code_interpreter.inside import charts, tables


class _ChartFormatter(BaseFormatter):
    """What a figure shows, as data."""

    format_type = Unicode("e2b/chart")
    print_method = ObjectName("_repr_e2b_chart_")
    _return_type = dict

    def pop(self, _typ: Any, default: Any = None) -> Any:
        """Keep what is there: who chooses the formats of pictures removes figures from all."""
        return default


class _DataFormatter(BaseFormatter):
    """What a table holds, as data."""

    format_type = Unicode("e2b/data")
    print_method = ObjectName("_repr_e2b_data_")
    _return_type = dict


def load_ipython_extension(shell: Any) -> None:
    """Add our formatters to a shell. The libraries they are for need not be there."""
    display = shell.display_formatter
    chart: Any = _ChartFormatter(parent=display)
    data: Any = _DataFormatter(parent=display)
    chart.for_type_by_name("matplotlib.figure", "Figure", charts.describe)
    # The module that the class says it is of differs between releases.
    for module in ("pandas", "pandas.core.frame"):
        data.for_type_by_name(module, "DataFrame", tables.describe)
    for formatter in (chart, data):
        display.formatters[formatter.format_type] = formatter
    display.active_types = display.format_types
