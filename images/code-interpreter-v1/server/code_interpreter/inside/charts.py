"""A matplotlib figure as data: what is drawn, so that somebody else can draw it.

Kinds: line, scatter, bar, pie, box_and_whisker; several axes in one figure are a superchart. What
is none of these is unknown and has its title alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from code_interpreter.inside.tables import plain

_UNIT = re.compile(r"^.*\((.*?)\)\s*$", re.DOTALL)
#: Of more points than this none is told: the picture is there too.
_MAX_POINTS = 20_000
_BOX_POINTS = 5
_SCALES = frozenset({"linear", "log", "symlog", "logit", "function", "functionlog", "asinh"})

Chart = dict[str, Any]


def describe(figure: Any) -> Chart | None:
    """The chart of a figure; None when nothing is drawn in it."""
    charts = [chart for axes in figure.axes if (chart := _of_axes(axes)) is not None]
    if len(charts) > 1:
        title = figure.get_suptitle() or None
        return {"type": "superchart", "title": title, "elements": charts}
    return charts[0] if charts else None


def _of_axes(axes: Any) -> Chart | None:
    if not axes.has_data() or axes.get_label() == "<colorbar>":
        return None
    if wedges := _named(axes.patches, "Wedge"):
        return {"type": "pie", "title": _title(axes), "elements": _slices(wedges)}
    if boxes := _boxes(axes):
        return _flat(axes, "box_and_whisker", boxes)
    if bars := _bars(axes):
        return _flat(axes, "bar", bars)
    if len(axes.lines):
        return _pointed(axes, "line", [(line, line.get_xydata()) for line in _own(axes.lines)])
    if scattered := _named(axes.collections, "PathCollection"):
        return _pointed(axes, "scatter", [(each, each.get_offsets()) for each in scattered])
    return {"type": "unknown", "title": _title(axes), "elements": []}


def _named(artists: Sequence[Any], kind: str) -> list[Any]:
    """Those of a class, by its name: its module may not have been imported."""
    return [each for each in artists if type(each).__name__ == kind]


def _own(artists: Sequence[Any]) -> list[Any]:
    return [each for each in artists if len(each.get_xydata())]


def _title(axes: Any) -> str | None:
    return axes.get_title() or None


def _flat(axes: Any, kind: str, elements: list[Any]) -> Chart:
    """A chart with two axes."""
    labels = {"x": axes.get_xlabel(), "y": axes.get_ylabel()}
    chart: Chart = {"type": kind, "title": _title(axes), "elements": elements}
    for name, label in labels.items():
        unit = _UNIT.match(label)
        chart |= {f"{name}_label": label or None, f"{name}_unit": unit[1] if unit else None}
    return chart


def _pointed(axes: Any, kind: str, drawn: list[tuple[Any, Any]]) -> Chart:
    """A chart of points, with the ticks by which they are read."""
    count = sum(len(points) for _, points in drawn)
    elements = [
        {"label": _label(artist, number), "points": _points(axes, points)}
        for number, (artist, points) in enumerate(drawn)
        if count <= _MAX_POINTS
    ]
    chart = _flat(axes, kind, elements)
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        ticks = axis.get_ticklocs()
        chart |= {
            f"{name}_ticks": [_coordinate(axis, value) for value in ticks],
            f"{name}_tick_labels": [tick.get_text() for tick in axis.get_ticklabels()],
            f"{name}_scale": _scale(axis),
        }
    return chart


def _points(axes: Any, points: Any) -> list[list[Any]]:
    return [[_coordinate(axes.xaxis, x), _coordinate(axes.yaxis, y)] for x, y in points]


def _label(artist: Any, number: int) -> str:
    label = str(artist.get_label())
    return f"Series {number + 1}" if label.startswith("_") else label


def _units(axis: Any) -> str:
    """What the numbers along an axis stand for: `datetime`, `categorical`, or themselves."""
    converter = axis.get_converter() if hasattr(axis, "get_converter") else axis.converter
    name = type(converter).__name__.lower()
    if "category" in name:
        return "categorical"
    return "datetime" if "date" in name or "period" in name else ""


def _scale(axis: Any) -> str:
    scale = axis.get_scale()
    return _units(axis) or (scale if scale in _SCALES else "unknown")


def _coordinate(axis: Any, value: Any) -> Any:
    """A place on an axis, as the caller has given it."""
    match _units(axis):
        case "datetime":
            from matplotlib.dates import num2date  # noqa: PLC0415 - only where it is drawn with

            return num2date(value).isoformat()
        case "categorical":
            names = {at: name for name, at in axis.units._mapping.items()}
            return names.get(round(float(value)), plain(value))
    return plain(value)


def _bars(axes: Any) -> list[Chart]:
    elements = []
    groups = [each for each in axes.containers if type(each).__name__ == "BarContainer"]
    for number, group in enumerate(groups):
        across = group.orientation == "horizontal"
        for bar in group.patches:
            width, height = bar.get_width(), bar.get_height()
            middle = bar.get_y() + height / 2 if across else bar.get_x() + width / 2
            elements.append(
                {
                    "label": _tick_at(axes.yaxis if across else axes.xaxis, middle, len(groups)),
                    "group": _label(group, number),
                    "value": plain(width if across else height),
                }
            )
    return elements


def _tick_at(axis: Any, value: float, groups: int = 1) -> str:
    """The text beside a place on an axis, or the place."""
    labels = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)
    near = [(abs(at - value), label.get_text()) for at, label in labels]
    distance, text = min(near, default=(1.0, ""))
    # Of bars in groups none stands just at the tick of all of them.
    return text if text and distance < (0.01 if groups == 1 else 0.5) else f"{value:g}"


def _slices(wedges: list[Any]) -> list[Chart]:
    return [
        {
            "label": str(wedge.get_label()),
            "angle": plain(abs(wedge.theta2 - wedge.theta1)),
            "radius": plain(wedge.r),
        }
        for wedge in wedges
    ]


def _boxes(axes: Any) -> list[Chart]:
    """Boxes with whiskers: each is drawn as a box, two whiskers, two caps, a median, fliers."""
    lines = list(axes.lines)
    starts = [at for at, line in enumerate(lines) if _is_box(line)]
    if not starts or starts[0] != 0:
        return []
    elements = []
    for at, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        parts = [line.get_xydata() for line in lines[at:end]]
        if len(parts) < 6 or any(len(part) != 2 for part in parts[1:6]):
            return []
        elements.append(_box(axes, parts))
    return elements


def _is_box(line: Any) -> bool:
    points = line.get_xydata()
    return len(points) == _BOX_POINTS and bool((points[0] == points[-1]).all())


def _box(axes: Any, parts: list[Any]) -> Chart:
    box, low, high, _, _, median, *fliers = parts
    # A median lies across its box.
    across = bool(median[0][0] == median[1][0])
    value, place = (0, 1) if across else (1, 0)
    middle = float((box[:, place].min() + box[:, place].max()) / 2)
    label = _tick_at(axes.yaxis if across else axes.xaxis, middle)
    return {
        "label": label,
        "min": plain(low[:, value].min()),
        "first_quartile": plain(box[:, value].min()),
        "median": plain(median[0][value]),
        "third_quartile": plain(box[:, value].max()),
        "max": plain(high[:, value].max()),
        "outliers": [plain(each) for part in fliers for each in part[:, value]],
    }
