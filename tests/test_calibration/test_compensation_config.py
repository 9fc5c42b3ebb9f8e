import pytest

from apq_mmdet.calibration.compensation import CompensationConfig
from apq_mmdet.errors import BadInputError


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (True, r"quant\.compensation: expected dict"),
        (dict(range=3), "did you mean 'ranges'"),
        (dict(activations=1), r"quant\.compensation\.activations: expected True or False, got 1"),
        (dict(rounding="yes"), r"quant\.compensation\.rounding: expected True or False"),
        (dict(weighted=None), r"quant\.compensation\.weighted: expected True or False"),
        (dict(ranges=-1), r"quant\.compensation\.ranges: expected a whole number >= 0, got -1"),
        (dict(ranges=1), r"quant\.compensation\.ranges: expected 0 or a whole number >= 2, got 1"),
        (dict(ranges=True), r"quant\.compensation\.ranges: .*got True"),
        (dict(damping=0), r"quant\.compensation\.damping: expected a number above 0, got 0"),
        (dict(damping=float("nan")), r"quant\.compensation\.damping"),
        (dict(activations=False, rounding=False, ranges=0), "nothing is made up for"),
    ],
)
def test_bad_values_are_named(config, message):
    with pytest.raises(BadInputError, match=message):
        CompensationConfig.from_dict(config, "quant.compensation")


def test_good_values_are_taken():
    assert CompensationConfig.from_dict({}, "c") == CompensationConfig()
    assert CompensationConfig.from_dict(dict(ranges=0, damping=1), "c") == CompensationConfig(ranges=0, damping=1)
