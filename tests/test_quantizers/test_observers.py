import copy
import random

import pytest
import torch

from apq_mmdet.errors import CalibrationError
from apq_mmdet.quantizers import AffineQuantizer, PercentileObserver


def no_error(x, low, high):
    return torch.zeros(len(x))


def wide_is_worse(x, low, high):
    return (high - low) * torch.arange(1.0, 3.0)


def percentile(groups=1, bits=4):
    quantizer = AffineQuantizer(bits, axis=0, groups=groups)
    quantizer.use_observer("percentile")
    return quantizer


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 30011])
def test_tails_are_the_quantiles_of_torch(n):
    x = torch.randn(3, n)
    lows, highs, _ = PercentileObserver().entry_of(x, no_error)
    p = torch.tensor([0.999, 0.9999, 0.99999], dtype=torch.float64)
    torch.testing.assert_close(highs, x.double().quantile(p, 1), rtol=1e-6, atol=1e-6)
    if n > 1:
        torch.testing.assert_close(lows, x.double().quantile(1 - p, 1), rtol=1e-6, atol=1e-6)


def test_by_hand():
    ramp = torch.arange(1001.0).repeat(2, 1)  # the 0.999 quantile is 999, the others 999.9 and 999.99
    observer = PercentileObserver()
    observer.observe(ramp, wide_is_worse)
    low, high = observer.range()
    assert low.tolist() == [0.0, 0.0]  # non-negative data: the minimum
    assert high.tolist() == [999.0, 999.0]
    observer.observe(ramp - 3000, lambda *range_: -10 * wide_is_worse(*range_))
    low, high = observer.range()  # now the widest wins, and the ends are means of the two calls
    assert low.tolist() == pytest.approx([-1500 + 0.005] * 2)
    assert high.tolist() == pytest.approx([-500.01] * 2)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_tail_with_the_least_squared_error_wins_in_each_group(bits):
    p = torch.tensor([0.999, 0.9999, 0.99999], dtype=torch.float64)
    outliers = (1.02, 3.0, 20.0, 200.0)
    x = torch.linspace(0, 1, 4001).repeat(len(outliers), 1)
    x[:, 7] = torch.tensor(outliers)
    quantizer = percentile(len(outliers), bits)
    quantizer.observe(x)
    for high, row in zip(quantizer.observed[1], x.double(), strict=True):
        tops = row.quantile(p)
        steps = tops / (2**bits - 1)
        values = [(row / s).round().clamp(0, 2**bits - 1) * s for s in steps]
        errors = torch.stack([(v - row).square().sum() for v in values])
        assert float(high) == pytest.approx(float(tops[errors.argmin()]), rel=1e-6)


def test_the_error_is_that_of_the_format_itself():
    quantizer = AffineQuantizer(2, axis=0, groups=2)
    before = copy.deepcopy(quantizer.state_dict())
    x = torch.tensor([[0.0, 1.0, 2.0, 5.0], [0.2, 0.4, 1.0, 3.0]])
    error = quantizer.range_error(x, torch.zeros(2), torch.tensor([3.0, 3.0]))
    assert error.tolist() == pytest.approx([4.0, 0.04 + 0.16])
    assert all(torch.equal(before[key], value) for key, value in quantizer.state_dict().items())


def test_the_error_of_a_symmetric_format_is_that_of_its_own_codes():
    quantizer = AffineQuantizer(2, symmetric=True)  # steps of 1 from -2 to 1
    error = quantizer.range_error(torch.tensor([[-1.0, 1.0, 0.4]]), torch.tensor([-1.0]), torch.tensor([1.0]))
    assert error.tolist() == pytest.approx([0.16])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("n", [1000, 5000, 300_000])
@pytest.mark.parametrize("kind", ["minmax", "percentile"])
def test_values_that_are_no_numbers_are_refused(kind, n, value):
    """One is enough, in one of two groups, in one of two images."""
    quantizer = AffineQuantizer(4, axis=0, groups=2)
    quantizer.use_observer(kind)
    images = [torch.linspace(-1, 1, n).repeat(2, 1) for _ in range(2)]
    images[0][1, n // 3] = value
    for image in images:
        quantizer.observe(image)
        quantizer.observer.end_image()
    with pytest.raises(CalibrationError, match="NaN or infinite values were observed"):
        quantizer.set_range_factor(1.0)


@pytest.mark.parametrize("kind", ["minmax", "percentile"])
def test_entries_of_several_processes_in_any_order(kind):
    calls = [torch.randn(2, 500) * 10 ** random.Random(i).uniform(-3, 3) for i in range(9)]
    whole, parts = AffineQuantizer(4, 0, 2), [AffineQuantizer(4, 0, 2) for _ in range(3)]
    for quantizer in (whole, *parts):
        quantizer.use_observer(kind)
    for i, x in enumerate(calls):
        whole.observe(x)
        parts[i % 2].observe(x)  # the third sees nothing
    assert parts[2].observed is None
    entries = [entry for part in parts for entry in part.observer.entries]
    for _ in range(3):
        random.Random(0).shuffle(entries)
        parts[2].observer.load(list(entries))
        assert all(torch.equal(a, b) for a, b in zip(parts[2].observed, whole.observed, strict=True))


def test_calls_of_one_image_have_their_widest_quantiles():
    calls = [torch.linspace(-1.0, 1.0, 4001)[None] * scale for scale in (1.0, 3.0, 2.0)]
    one, several = PercentileObserver(), PercentileObserver()
    for observer, images in ((one, [[calls[1]], [calls[0]]]), (several, [calls, [calls[0]]])):
        for image in images:
            for call in image:
                observer.observe(call, no_error)
            observer.end_image()
    assert len(several.entries) == 2
    assert all(torch.equal(a, b) for a, b in zip(one.range(), several.range(), strict=True))


def test_errors_of_all_calls_of_an_image_count():
    """The middle tail has the least error in all, though in neither call."""
    observer, errors = PercentileObserver(), iter((1.0, 4.0, 9.0, 8.0, 3.0, 0.0))
    for _ in range(2):
        observer.observe(torch.arange(1001.0)[None], lambda *_: torch.tensor([next(errors)]))
    observer.end_image()
    assert observer.range()[1].tolist() == pytest.approx([999.9])  # of errors 9, 7 and 9


def test_loaded_entries_are_of_images_that_have_ended():
    """Such as those of several processes, which are more than the observer's own."""
    own, other = PercentileObserver(), PercentileObserver()
    for observer, number in ((own, 2), (other, 3)):
        for image in range(number):
            observer.observe(torch.linspace(-1.0, 1.0, 101)[None] * (image + number), no_error)
            observer.end_image()
    entries = [*own.entries, *other.entries]
    own.load(entries)
    own.end_image()
    assert len(own.entries) == 5
    own.observe(torch.ones(1, 9), no_error)
    own.observe(torch.ones(1, 9), no_error)
    own.end_image()
    assert len(own.entries) == 6


def test_sums_over_calls_are_exact():
    observer = PercentileObserver()
    ends = [torch.tensor([value], dtype=torch.float64) for value in (1e17, 3.0, -1e17)]
    tails = len(observer.tails)
    observer.load([torch.stack([end, end, torch.zeros(1)])[:, None].expand(3, tails, 1) for end in ends])
    assert [end.tolist() for end in observer.range()] == [[1.0], [1.0]]


@pytest.mark.parametrize("kind", ["minmax", "percentile"])
def test_the_observed_range_can_be_read_and_forgotten(kind):
    quantizer = AffineQuantizer(4)
    quantizer.use_observer(kind)
    assert quantizer.observed is None
    quantizer.observe(torch.tensor([-0.3, -0.3]))
    assert [end.tolist() for end in quantizer.observed] == [pytest.approx([-0.3]), pytest.approx([-0.3])]
    assert all(end.dtype == torch.float32 for end in quantizer.observed)
    quantizer.forget_observed()
    assert quantizer.observed is None
    quantizer.observe(torch.tensor([5.0, 5.0]))
    quantizer.observe(torch.empty(0))
    assert [end.tolist() for end in quantizer.observed] == [[5.0], [5.0]]


def test_unknown_observer():
    with pytest.raises(ValueError, match=r"'mean'.*minmax, percentile"):
        AffineQuantizer(4).use_observer("mean")
