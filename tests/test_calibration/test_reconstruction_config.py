import pytest

from apq_mmdet.calibration.reconstruction import ReconstructionConfig
from apq_mmdet.errors import BadInputError


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(iteration=5), r"quant.reconstruction: unknown key 'iteration'; did you mean 'iterations'"),
        (dict(weighting="hesian"), r"quant.reconstruction.weighting: unknown value 'hesian'; did you mean 'hessian'"),
        (dict(rounding="adarond"), r"quant.reconstruction.rounding: unknown value 'adarond'; did you mean 'adaround'"),
        (dict(max_bits=9), r"quant.reconstruction.max_bits: bits must be a whole number from 2 to 8, got 9"),
        (dict(iterations=0), r"quant.reconstruction.iterations: expected a whole number >= 1, got 0"),
        (dict(batch=1.5), r"quant.reconstruction.batch: expected a whole number >= 1, got 1.5"),
        (dict(batch=True), r"quant.reconstruction.batch"),
        (dict(keep_float=1.1), r"quant.reconstruction.keep_float: expected a number from 0 to 1, got 1.1"),
        (dict(keep_float=float("nan")), r"quant.reconstruction.keep_float"),
        (dict(rounding_lr=-1), r"quant.reconstruction.rounding_lr"),
        (dict(step_lr="fast"), r"quant.reconstruction.step_lr"),
        (dict(rounding_weight=-0.1), r"quant.reconstruction.rounding_weight"),
        (dict(rounding_lr=0, step_lr=0), r"nothing is learned"),
        (True, r"quant.reconstruction: expected dict"),
    ],
)
def test_bad_settings_are_named(config, message):
    with pytest.raises(BadInputError, match=message):
        ReconstructionConfig.from_dict(config, "quant.reconstruction")


def test_settings_are_taken():
    config = ReconstructionConfig.from_dict(dict(weighting="fisher", keep_float=0, batch=8), "x")
    assert (config.weighting, config.keep_float, config.batch) == ("fisher", 0, 8)
    assert config.iterations == ReconstructionConfig().iterations
