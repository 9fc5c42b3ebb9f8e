"""Several processes calibrate as one: each has its own images, and the result does not depend on their number.

Candidate errors are sums over images. They are gathered and added in the order of the images, in float64, so that near
ties fall the same way for any number of processes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from mmengine.dist import all_gather_object, broadcast_object_list, get_dist_info
from torch import Tensor

from apq_mmdet.errors import BadInputError, CalibrationError, CheckpointError
from apq_mmdet.quantizers import Quantizer

Result = TypeVar("Result")

REFUSALS = (BadInputError, CheckpointError)
SHARD = 8  # neighbouring images, whose small calls share a tile; images are dealt to the processes by shards


def own_images(number: int, rank: int | None = None, processes: int | None = None) -> list[int]:
    """Indices of a process' images: shards of neighbours, dealt in turn, because neighbours share tiles.

    Args:
        number: of all images.
        rank, processes: of this process and in this run, where they are not given.
    """
    if rank is None or processes is None:
        rank, processes = get_dist_info()
    return [image for image in range(number) if image // SHARD % processes == rank]


@contextmanager
def _all_alive() -> Iterator[None]:
    """Context of what all processes do together."""
    try:
        yield
    except RuntimeError as error:
        raise CalibrationError(
            f"another process of this calibration has died or hangs ({error}); its own message says why. Start all "
            f"processes again with --resume"
        ) from error


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank.

    Raises:
        CalibrationError: another process is gone.
    """
    with _all_alive():
        return all_gather_object(value)


def _told_by(rank: int, value: Any) -> Any:
    """What the process of this rank gives as ``value``, in all processes."""
    told = [value]
    with _all_alive():
        broadcast_object_list(told, rank)
    return told[0]


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Give tensors of every process the values of the first one: machines that compute differently still end alike."""
    own = list(tensors)
    for tensor, value in zip(own, _told_by(0, [tensor.detach().cpu() for tensor in own]), strict=True):
        tensor.copy_(value)


def refused_together(check: Callable[[], Result], here: bool = True) -> Result | None:
    """Let some processes check something; what one of them refuses is refused by all, which would wait for it.

    Args:
        check: may raise one of REFUSALS.
        here: whether this process does it.

    Returns:
        What ``check`` returns; None in processes that do nothing.

    Raises:
        BadInputError: a process has refused: its own error, or else what that of the first one said.
    """
    result, refusal = None, None
    try:
        result = check() if here else None
    except REFUSALS as error:
        refusal = error
    refusals = [found for found in gather(None if refusal is None else str(refusal)) if found is not None]
    if refusals:
        raise refusal or BadInputError(refusals[0])
    return result


def by_shard(own: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """The values of all shards of all processes in the order of the shards.

    A process holds one value of its own and one of another at a time, however many there are: they may be large. So
    the caller should let go of each before it takes the next.

    Args:
        own: (shard, value) of this process' shards in their order; None is passed over.

    Raises:
        CalibrationError: another process is gone.
    """
    rank, processes = get_dist_info()
    entry, turn = next(own, None), 0
    while any(gather(entry is not None)):
        is_due = entry is not None and entry[0] // processes == turn
        for source in range(processes):
            value = _told_by(source, entry[1] if is_due and source == rank else None)
            if value is not None:
                yield value
            del value
        if is_due:
            entry = None  # given up before the next one is made
            entry = next(own, None)
        turn += 1


def share_observed(quantizers: Sequence[Quantizer]) -> None:
    """Let the observers of every process hold what all processes saw."""
    own = [[entry.cpu() for entry in q.observer.entries] for q in quantizers]
    for quantizer, *seen in zip(quantizers, *gather(own), strict=True):
        device = quantizer.scale.device
        quantizer.observer.load([entry.to(device) for entries in seen for entry in entries])
