"""The table of all results of a work dir, in JSON and Markdown."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from apq_mmdet.errors import BadInputError
from apq_mmdet.files import write_atomic, write_json
from apq_mmdet.reproduction.entry import Entry
from apq_mmdet.reproduction.prepare import IDS, Examined
from apq_mmdet.reproduction.published import other_methods
from apq_mmdet.reproduction.rows import AP

HEADER = (
    *("model", "recipe", "bits", "scope", "images", "seed", "published", "ours", "difference"),
    *("calibration", "total", "made with", "state"),
)


class Table:
    """The lines of this command, and those with a result that earlier commands left in the work dir.

    Args:
        entries: of detectors and rows.
        examined: the data and checkpoints that they are measured with.
        folder: gets ``table.json`` and ``table.md``.

    Raises:
        BadInputError: what is there was measured on other data, or is no such table.
    """

    def __init__(self, entries: Sequence[Entry], examined: Examined, folder: Path) -> None:
        self.entries, self.examined = entries, examined
        self.json, self.markdown = folder / "table.json", folder / "table.md"
        own = {entry.item.name for entry in entries}
        self._earlier: list[dict[str, Any]] = []
        if self.json.exists():
            try:
                before = json.loads(self.json.read_text())
                sha256, root = before["data"]["sha256"], before["data"]["root"]
                self._earlier = [row for row in before["rows"] if row["ours"] and row["name"] not in own]
            except (ValueError, KeyError, TypeError) as error:
                raise BadInputError(f"{self.json} is no table of this command; use another --work-dir") from error
            if before["rows"] and sha256 != examined.data.sha256:
                raise BadInputError(f"{self.json} is of {root}, other data; use another --work-dir")

    def write(self) -> None:
        """Both files, each atomically."""
        content = self.to_dict()
        write_json(self.json, content)
        write_atomic(self.markdown, (render(content, str(self.examined.data)) + "\n").encode())

    def to_dict(self) -> dict[str, Any]:
        """Plain containers; the rows of a float detector follow it."""
        data = self.examined.data
        rows = [*(entry.to_dict(self.examined) for entry in self.entries), *self._earlier]
        detectors = list(dict.fromkeys(row["float_model"] for row in rows))
        rows.sort(key=lambda row: (detectors.index(row["float_model"]), row["recipe"] is not None))
        return {
            "data": {"is_coco": data.is_coco, "root": data.root, "images": data.images, "sha256": data.sha256},
            "rows": rows,
        }


def render(content: dict[str, Any], data: str) -> str:
    """The table for a person, as Markdown.

    Args:
        content: of ``table.json``.
        data: what was measured on, in words.
    """
    rows, is_coco = content["rows"], content["data"]["is_coco"]
    stacks = list(dict.fromkeys(_stack(row) for row in rows if row["ours"]))
    title = "COCO val2017, published and reproduced" if is_coco else "NOT COCO: a trial of the reproduction kit"
    trial = "" if is_coco else " Differences are left out: no number of ours says anything about COCO."
    lines = [HEADER, ("---",) * len(HEADER), *(_cells(row, stacks) for row in rows)]
    return "\n".join(
        [
            f"# {title}",
            "",
            f"Data: {data}.",
            f"Box AP / mask AP in percent; difference is ours less the published one; times in minutes.{trial}",
            "",
            *_markdown(lines),
            "",
            *(f"* made with {number}: {stack}" for number, stack in enumerate(stacks, 1)),
            *_notes(rows),
            *_others(rows),
        ]
    )


def _cells(row: dict[str, Any], stacks: list[str]) -> tuple[str, ...]:
    minus = row["difference"] and AP(**row["difference"])
    return (
        row["model"],
        *("-" if row[key] is None else str(row[key]) for key in ("recipe", "bits", "scope", "num_calib", "seed")),
        str(AP(row["published"]["box"], row["published"]["mask"])) if row["published"] else "-",
        str(AP(**row["ours"])) if row["ours"] else "-",
        " / ".join("-" if value is None else f"{value:+.1f}" for value in minus) if minus else "-",
        *(f"{row[key] / 60:.1f}" if key in row else "-" for key in ("calibration_seconds", "seconds")),
        str(stacks.index(_stack(row)) + 1) if row["ours"] else "-",
        row["state"],
    )


def _stack(row: dict[str, Any]) -> str:
    """Versions and device that a result was made with."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{versions}; {row['device']}, threads: {row['threads']}"


def _notes(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    sources = [(AP(p["box"], p["mask"]), p["source"]) for p in (row["published"] for row in rows) if p]
    yield from dict.fromkeys(f"* published {ap}: {source}" for ap, source in sources)
    used = {(row["float_model"], row["checkpoint"]["sha256"]): row["checkpoint"] for row in rows}
    for (model, sha256), weights in used.items():
        users = [row["name"] for row in rows if (row["float_model"], row["checkpoint"]["sha256"]) == (model, sha256)]
        ambiguous = sum(other == model for other, _ in used) > 1  # made anew with other weights meanwhile
        name = f"{model} in {', '.join(users)}" if ambiguous else model
        checked = "its publisher's" if weights["verified"] else "not compared: its publisher gives none"
        form = "; converted into mmdet 3's keys" if weights["converted"] else ""
        yield f"* weights of {name}: {weights['file']}, sha256 {weights['sha256']} ({checked}){form}"
    yield f"* calibration images of a row: `{IDS}` in its folder"
    for row in rows:
        if row.get("evaluated_calibration_images"):
            number = row["evaluated_calibration_images"]
            yield f"* {row['name']}: {number} calibration images are evaluated ones, so its AP is that of seen images"


def _others(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was published for these detectors and bits, of all methods."""
    pairs = dict.fromkeys((row["float_model"], row["bits"]) for row in rows if row["recipe"])
    lines = [line for name, bits in pairs for line in other_methods(name, bits)]
    if lines:
        header = ("detector", "bits", "method", "AP", "source")
        yield from ("", "## Published for these detectors and bits", "")
        yield from _markdown([header, ("---",) * len(header), *lines])


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in rows]
