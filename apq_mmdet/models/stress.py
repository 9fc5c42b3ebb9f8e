"""Detectors made harder to quantize: the same float function, but channels as uneven as reported of pretrained ViTs.

Detectors that were trained from scratch on little data have even channels, and flatter methods that cannot cope with
others. FQ-ViT (arXiv 2111.13824) reports channel ranges of up to more than 40 times the median around the
LayerNorms of pretrained vision transformers, Swin among them. It looked at the norms' inputs; no figure for their
outputs was found, where RepQ-ViT (arXiv 2212.08254) shows severe variation without a number. So 40 is taken as the
most uneven place's largest range over the median behind a norm. For queries, keys and values nothing is matched: they
get a spread, but no outliers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apq_mmdet.calibration.transforms import NormRescaling, Rescaling, channel_extents, rescalings_of
from apq_mmdet.errors import BadInputError

PEAK = 40.0  # FQ-ViT's largest channel range over the median
SPREAD = 0.5  # standard deviation of the logarithm of a channel's factor; a choice, no published figure
OUTLIERS = 0.02  # share of the channels behind a norm that are outliers, at least one; a choice too


@dataclass(frozen=True)
class Unevenness:
    """Largest channel size over the median, of one tensor of one place, before and after."""

    place: str
    role: str
    before: float
    after: float


def rescalings_by_name(model: nn.Module) -> dict[str, Rescaling]:
    """Every rescaling of a model by ``block.place``.

    Raises:
        BadInputError: there is none.
    """
    places = {f"{name}.{p.name}".lstrip("."): p for name, block in model.named_modules() for p in rescalings_of(block)}
    if not places:
        raise BadInputError("the model has no block that can be rescaled: it needs a Swin backbone of mmdet")
    return places


def check_factors(spread: float, peak: float) -> None:
    """Raise BadInputError where these are no spread and no peak of ``stress``."""
    if not (0 <= spread < math.inf and 1 <= peak < math.inf):
        raise BadInputError(f"spread must be at least 0 and peak at least 1, got {spread:g} and {peak:g}")


def stress(
    model: nn.Module, run: Callable[[], None], seed: int = 0, spread: float = SPREAD, peak: float = PEAK
) -> list[Unevenness]:
    """Make the channels of a float model uneven in place, without changing its function but for rounding.

    Args:
        model: float32, in eval mode.
        run: runs it on some images, on which channel ranges are measured.
        seed: of all factors.
        spread: standard deviation of the logarithm of every channel's factor.
        peak: largest channel range over the median behind a norm. Places are drawn log-uniformly between a quarter of
            it and all of it; one that is more uneven already stays so.

    Raises:
        BadInputError: the model has nothing to rescale, or spread and peak are out of their ranges.
    """
    check_factors(spread, peak)
    places = rescalings_by_name(model)
    before = _spans(places, run)
    places = {name: place for name, place in places.items() if name in before}
    if not places:
        raise BadInputError("no layer whose channels can be rescaled runs on these images")
    generator = torch.Generator().manual_seed(seed)
    for name, place in places.items():
        size = before[name][0][1]  # of the first role; all have one entry per channel
        factors = (spread * torch.randn(len(size), generator=generator, dtype=torch.float64)).exp()
        if isinstance(place, NormRescaling):
            factors = _with_outliers(size, factors, peak, generator)
        place.divide(1 / factors)
    after = _spans(places, run)
    return [
        Unevenness(name, role, unevenness(size), unevenness(new))
        for name in places
        for (role, size), (_, new) in zip(before[name], after[name], strict=True)
    ]


def unevenness(size: Tensor) -> float:
    """Largest over median of the channels that have an extent; NaN if none has."""
    living = size[size > 0]
    return float(living.max() / living.median()) if len(living) else math.nan


def _spans(places: dict[str, Rescaling], run: Callable[[], None]) -> dict[str, list[tuple[str, Tensor]]]:
    """Sizes of the channels by role, of the places whose layers run."""
    extents = zip(places.items(), channel_extents(list(places.values()), run), strict=True)
    return {name: list(place.spans(*extent).items()) for (name, place), extent in extents if extent is not None}


def _with_outliers(size: Tensor, factors: Tensor, peak: float, generator: torch.Generator) -> Tensor:
    """Let a few channels become much larger than the median; the largest decides the ratio."""
    living = size > 0  # a channel without extent stays so under any factor
    if living.sum() < 2:
        return factors
    chosen = torch.randperm(len(size), generator=generator)
    chosen = chosen[living[chosen]][: max(1, round(OUTLIERS * int(living.sum())))]
    draws = torch.rand(len(chosen), generator=generator, dtype=torch.float64)
    ratios = peak * torch.exp(-math.log(4) * draws)  # log-uniform in peak / 4..peak
    median = (size * factors).index_fill(0, chosen, torch.inf)[living].median()  # the outliers end up above it
    return factors.index_copy(0, chosen, ratios * median / size[chosen])
