"""The layer table as text."""

from collections.abc import Sequence

from apq_mmdet.layers.convert import LayerRow

HEADER = ("layer", "kind", "role", "bits", "format", "granularity", "why float")


def render_table(rows: Sequence[LayerRow]) -> str:
    """One line for each layer and role, and a line of totals."""
    cells = [(r.layer, r.kind, r.role, str(r.bits or 32), r.format, _granularity(r), r.reason) for r in rows]
    widths = [max(len(row[i]) for row in [HEADER, *cells]) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [HEADER, *cells]]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([*lines, _totals(rows)])


def _granularity(row: LayerRow) -> str:
    return row.granularity if row.groups <= 1 else f"{row.granularity} ({row.groups})"


def _totals(rows: Sequence[LayerRow]) -> str:
    quantized = {r.layer for r in rows if r.bits}
    weights = {r.layer: r.elements for r in rows}
    quantized_weights = sum(r.elements for r in rows if r.bits and r.role == "weight")
    share = quantized_weights / max(sum(weights.values()), 1)
    return (
        f"{len(quantized)} layers quantized, {len(weights) - len(quantized)} float; "
        f"{share:.1%} of {sum(weights.values()):,} weights in integers"
    )
