"""Several processes calibrate as one: each has its own images, and the result does not depend on their number.

Candidate errors are sums over images. They are gathered and added in the order of the images, in float64, so that near
ties fall the same way for any number of processes.
"""

from collections.abc import Sequence
from typing import Any

from mmengine.dist import all_gather_object, get_dist_info

from apq_mmdet.errors import CalibrationError
from apq_mmdet.quantizers import Quantizer

SHARD = 8  # neighbouring images whose small calls share a tile; the least number of images that a process is given


def own_images(number: int) -> list[int]:
    """Indices of this process' images: shards of neighbours, dealt in turn, because neighbours share tiles."""
    rank, processes = get_dist_info()
    return [image for image in range(number) if image // SHARD % processes == rank]


def is_first() -> bool:
    """Whether this process shows progress and keeps the finished blocks."""
    return get_dist_info()[0] == 0


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank.

    Raises:
        CalibrationError: another process is gone.
    """
    try:
        return all_gather_object(value)
    except RuntimeError as error:
        raise CalibrationError(
            f"another process of this calibration has died or hangs ({error}); its own message says why. Start all "
            f"processes again with --resume"
        ) from error


def share_observed(quantizers: Sequence[Quantizer]) -> None:
    """Let the observers of every process hold what all processes saw."""
    own = [[entry.cpu() for entry in q.observer.entries] for q in quantizers]
    for quantizer, *seen in zip(quantizers, *gather(own), strict=True):
        device = quantizer.scale.device
        quantizer.observer.load([entry.to(device) for entries in seen for entry in entries])
