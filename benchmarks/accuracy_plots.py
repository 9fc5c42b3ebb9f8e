"""The accuracy benchmark's rows as plots: AP over bits, and AP over calibration time."""

import io
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from accuracy_grid import DETECTORS, FIRST_BITS, GROUNDS, Spec
from accuracy_report import bits_order, compared, float_rows, percent
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

Row = dict[str, Any]
SCOPE = "backbone"
# Okabe and Ito's palette, which colour-blind readers can tell apart; marker and line tell recipes of one colour apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, LINES = ("o", "s", "^", "D", "v", "P"), ("-", "--", ":")
PANEL = (4.6, 3.4)  # inches
DPI = 100


def panels(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The plotted rows of each detector and ground: all val images, and the commonest number of images."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in compared(rows):
        spec = Spec.from_row(row)
        if spec.scope == SCOPE and spec.num_val is None:
            found.setdefault((spec.detector, spec.ground), []).append(row)
    for key, part in found.items():
        images = Counter(row["num_calib"] for row in part).most_common(1)[0][0]
        found[key] = [row for row in part if row["num_calib"] == images]
    return dict(sorted(found.items(), key=lambda item: (DETECTORS.index(item[0][0]), GROUNDS.index(item[0][1]))))


def styles(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Colour, marker and line of each recipe, the same in every panel."""
    recipes = sorted({row["recipe"] for row in rows})
    return {
        recipe: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": LINES[i // len(COLOURS) % len(LINES)],
        }
        for i, recipe in enumerate(recipes)
    }


def mean_ap(rows: Sequence[Row]) -> float:
    """Mean box AP in percent over seeds."""
    return statistics.fmean(percent(row, "bbox") for row in rows)


def by_recipe(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows grouped by recipe, in alphabetical order."""
    return {name: [row for row in rows if row["recipe"] == name] for name in sorted({row["recipe"] for row in rows})}


def new_figure(number: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, two in a row."""
    columns = min(number, 2)
    lines = -(-number // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(PANEL[0] * columns, PANEL[1] * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[number:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:number])


def dress(axis: Axes, key: tuple[str, str], rows: Sequence[Row], reference: Sequence[Row]) -> None:
    """Title, grid and the float detector's line."""
    axis.set_title(f"{key[0]}, {key[1]}, {rows[0]['num_calib']} images", fontsize=10)
    axis.set_ylabel("box AP", fontsize=9)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)
    if reference:
        axis.axhline(percent(reference[0], "bbox", "float_metrics"), color="grey", linewidth=1, linestyle="-.")
        axis.annotate(
            "float",
            (0.01, percent(reference[0], "bbox", "float_metrics")),
            xycoords=("axes fraction", "data"),
            xytext=(2, 2),
            textcoords="offset points",
            fontsize=8,
            color="grey",
        )
        axis.margins(y=0.1)


def ap_over_bits(found: dict[tuple[str, str], list[Row]], rows: Sequence[Row]) -> Figure:
    """Box AP over bits, a line for each recipe."""
    figure, axes = new_figure(len(found))
    look = styles([row for part in found.values() for row in part])
    for axis, (key, part) in zip(axes, found.items(), strict=True):
        widths = sorted({row["bits"] for row in part}, key=bits_order, reverse=True)
        for recipe, runs in by_recipe(part).items():
            shown = [width for width in widths if any(row["bits"] == width for row in runs)]
            aps = [mean_ap([row for row in runs if row["bits"] == width]) for width in shown]
            places = [widths.index(width) for width in shown]
            axis.plot(places, aps, **look[recipe], label=recipe, linewidth=1.4, markersize=5)
        axis.set_xticks(range(len(widths)), widths)
        dress(axis, key, part, float_rows(rows, Spec.from_row(part[0])))
    lines = {text: line for axis in axes for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    names = sorted(lines)
    figure.legend(
        [lines[n] for n in names], names, loc="outside lower center", ncols=4, fontsize=8, frameon=False, handlelength=3
    )
    return figure


def ap_over_time(found: dict[tuple[str, str], list[Row]], rows: Sequence[Row]) -> Figure:
    """Box AP over the seconds of calibration, a panel for each of the first bits, a labelled point for each recipe."""
    of_width = {
        (key, width): part
        for width in FIRST_BITS
        for key, whole in found.items()
        if (part := [row for row in whole if row["bits"] == width])
    }
    figure, axes = new_figure(len(of_width))
    look = styles([row for part in of_width.values() for row in part])
    for axis, ((key, width), part) in zip(axes, of_width.items(), strict=True):
        points = []
        for recipe, runs in by_recipe(part).items():
            seconds = statistics.median(row["calibration_seconds"] for row in runs)
            points.append((seconds, mean_ap(runs), recipe))
            axis.scatter(*points[-1][:2], color=look[recipe]["color"], marker=look[recipe]["marker"], s=28, zorder=3)
        axis.set_xscale("log")
        axis.margins(x=0.3)
        axis.set_xlabel(f"seconds of calibration, {width}", fontsize=9)
        dress(axis, key, part, float_rows(rows, Spec.from_row(part[0])))
        figure.canvas.draw()  # fixes the scales that the labels are placed by
        place_labels(axis, points)
    return figure


def place_labels(axis: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Label points, each at the first place around it that is free.

    Args:
        points: x, y and text.
    """
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axis.transData.transform([p[:2] for p in points])]
    inside = axis.get_window_extent()
    offsets = sorted(
        ((x, y) for y in range(-60, 61, 6) for x in (7, -7)), key=lambda place: (abs(place[1]), place[0] < 0)
    )
    for x, y, text in sorted(points, key=lambda point: -point[1]):
        label = axis.annotate(text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8, va="center")
        for dx, dy in offsets:
            label.set_position((dx, dy))
            label.set_horizontalalignment("left" if dx > 0 else "right")
            box = label.get_window_extent()
            if (
                not any(box.overlaps(other) for other in taken)
                and inside.containsx(box.x0)
                and inside.containsx(box.x1)
            ):
                break
        taken.append(box)
        if abs(dy) > 6:  # far enough from its point that a line has to say whose it is
            axis.annotate(
                "",
                (x, y),
                (dx, dy),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.6},
            )


def draw_plots(rows: Sequence[Row], folder: Path) -> None:
    """Write ``ap_over_bits.png`` and ``ap_over_time.png``; nothing without rows to plot."""
    found = panels(rows)
    if not found:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("ap_over_bits", ap_over_bits), ("ap_over_time", ap_over_time)):
        figure = draw(found, rows)
        picture = io.BytesIO()
        figure.savefig(picture, dpi=DPI)
        plt.close(figure)
        Image.open(picture).convert("RGB").quantize(128).save(
            folder / f"{name}.png", optimize=True
        )  # a third of the size
