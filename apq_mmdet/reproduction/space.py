"""Whether the disks have room for what is to come."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from apq_mmdet.reproduction.costs import Cost


def shortage(costs: Sequence[Cost], work_dir: Path) -> str | None:
    """What is missing for rows that run one after the other, in words, or None.

    Args:
        costs: of the rows.
        work_dir: existing folder of their results.
    """
    if not costs:
        return None
    kept, temporary = sum(cost.kept_bytes for cost in costs), max(cost.temporary_bytes for cost in costs)
    needs = [(work_dir, kept + temporary), (Path(tempfile.gettempdir()), max(cost.results_bytes for cost in costs))]
    by_disk: Counter[int] = Counter()
    for folder, need in needs:
        by_disk[folder.stat().st_dev] += need
    for folder, _ in needs:
        need, free = by_disk[folder.stat().st_dev], shutil.disk_usage(folder).free
        if free < need:
            return (
                f"{folder} has {free / 2**30:.2f} GiB free, what is to be made needs up to {need / 2**30:.2f} GiB; "
                f"free some, choose fewer --rows or another --work-dir"
            )
    return None
