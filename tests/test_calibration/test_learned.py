import pytest
import torch
from torch import nn

from apq_mmdet.calibration.learned import (
    LearnedCodes,
    LearnedRounding,
    LearnedSteps,
    TrainedActivation,
    trained_activations,
)
from apq_mmdet.layers.base import to_quantized
from apq_mmdet.quantizers import AffineQuantizer, MatthewQuantizer


def linear(weight, scale, zero_point, bits=3):
    """A quantized linear layer with these weights, [out, in], and parameters."""
    weight = torch.tensor(weight)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    quantizer = AffineQuantizer(bits, axis=0, groups=len(scale))
    quantizer.set_parameters(torch.tensor(scale), torch.tensor(zero_point))
    return to_quantized(layer, {"weight": quantizer})


@pytest.mark.parametrize("learned", [LearnedCodes, lambda layers: LearnedRounding(layers, weight=0.0)])
def test_groups_of_zeros_stay_zeros(learned):
    """Their step is 1 whatever the other ones are."""
    layer = linear([[0.0, 0.0, 0.0], [0.02, 0.0, -0.02]], [1.0, 0.02], [0, 2])
    part = learned([layer])
    with torch.no_grad():
        part.values.fill_(9.0)
        part.use()
        assert torch.equal(layer.quantizers["weight"].fixed[0], torch.zeros(3))
        part.write()
    assert torch.equal(layer.weight[0], torch.zeros(3))
    assert layer.weight[1, 1] > 0  # a zero among others moves


@torch.no_grad()
def soft(rounding, layer):
    rounding.use()
    return layer.quantizers["weight"].fixed


def test_learning_starts_at_the_float_weights_and_at_the_ends_of_the_range():
    # codes 0..7 with zero point 2 and step 0.5: values -1 to 2.5
    layer = linear([[0.2, -0.6, 2.4, 2.7, -1.3]], [0.5], [2])
    rounding = LearnedRounding([layer], weight=0.0)
    torch.testing.assert_close(soft(rounding, layer), torch.tensor([[0.2, -0.6, 2.4, 2.5, -1.0]]))


def test_written_weights_by_hand():
    layer = linear([[0.2, -0.6, 2.4, 2.7, -1.3], [0.2, 0.3, 0.4, 0.0, 0.0]], [0.5, 1.0], [2, 0])
    rounding = LearnedRounding([layer], weight=0.0)
    with torch.no_grad():
        rounding.values[:5] = torch.tensor([0.1, -0.1, 5.0, 5.0, -5.0])  # up, down, up, out of range, out of range
        rounding.values[5:7] = torch.tensor([-9.0, 9.0])
        rounding.write()
    want = torch.tensor([[0.5, -1.0, 2.5, 2.5, -1.0], [0.0, 1.0, 0.0, 0.0, 0.0]])
    assert torch.equal(layer.weight, want)


@pytest.mark.parametrize("symmetric", [False, True])
def test_untouched_values_round_to_nearest_and_written_weights_keep_their_codes(symmetric):
    layer = nn.Linear(40, 12)
    quantizer = AffineQuantizer(4, axis=0, groups=12, symmetric=symmetric)
    to_quantized(layer, {"weight": quantizer})
    quantizer.observe(layer.weight)
    quantizer.set_range_factor(0.8)
    nearest = quantizer.fake_quantize(layer.weight.detach())
    rounding = LearnedRounding([layer], weight=0.0)
    with torch.no_grad():
        rounding.write()
        assert torch.equal(layer.weight, nearest)
        rounding = LearnedRounding([layer], weight=0.0)  # weights that are on their grid stay there
        rounding.write()
    assert torch.equal(layer.weight, nearest)
    assert torch.equal(quantizer.fake_quantize(layer.weight.detach()), layer.weight)


def test_gradient_of_the_regulariser():
    layer = linear([[0.1, 0.7, 1.2, 3.4, 2.95, 99.3]], [1.0], [0])
    rounding = LearnedRounding([layer], weight=0.3)
    with torch.no_grad():
        rounding.values[4] = 4.0  # the sigmoid's tail, where h stays 1
    assert rounding.own_grad(0.19) == 0.0
    values = rounding.values.detach().double().requires_grad_()
    for done, beta in ((0.2, 20.0), (0.6, 11.0), (1.0, 2.0)):
        h = (1.2 * torch.sigmoid(values) - 0.1).clamp(0, 1)
        (want,) = torch.autograd.grad(0.3 * (1 - (2 * h - 1).abs() ** beta).sum(), values)
        torch.testing.assert_close(rounding.own_grad(done).double(), want, rtol=1e-4, atol=1e-6)
    assert rounding.own_grad(1.0)[5] == 0  # out of range, and not moved by anything


def test_codes_move_by_hand():
    # codes 0..3 with zero points 1 and 0
    layer = linear([[0.5, -0.5, 1.0, 0.0], [1.0, 1.0, 3.0, 0.0]], [0.5, 1.0], [1, 0], bits=2)
    before = layer.weight.detach().clone()
    learned = LearnedCodes([layer])
    assert torch.equal(soft(learned, layer), before)
    with torch.no_grad():
        learned.values[:] = torch.tensor([0.6, -0.7, 0.9, -0.4, -1.2, 0.4, 0.6, 0.51])
    used = soft(learned, layer).clone()
    want = torch.tensor([[1.0, -0.5, 1.0, 0.0], [0.0, 1.0, 3.0, 1.0]])
    assert torch.equal(used, want)
    assert torch.equal(layer.weight, before)  # not before they are written
    # nothing is gathered beyond the ends of a range
    assert learned.values.tolist() == pytest.approx([0.6, 0.0, 0.0, -0.4, -1.0, 0.4, 0.0, 0.51])
    with torch.no_grad():
        learned.write()
    assert torch.equal(layer.weight, want)
    assert torch.equal(layer.quantizers["weight"].fake_quantize(want), want)


def test_gradients_of_codes_count_steps():
    layers = [linear([[0.5, 1.0]], [0.5], [1], bits=2), linear([[4.0], [3.0]], [4.0, 3.0], [0, 0], bits=2)]
    learned = LearnedCodes(layers)
    learned.use()
    loss = sum((layer.quantizers["weight"].fixed * (2 + i)).sum() for i, layer in enumerate(layers))
    (grad,) = torch.autograd.grad(loss, learned.values)
    assert grad.tolist() == [1.0, 1.0, 12.0, 9.0]
    assert [learned.rate(done) for done in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])


def test_gradient_of_a_step_by_hand():
    quantizer = AffineQuantizer(2, axis=-1, groups=2)  # codes 0..3, less zero point 1: -1..2
    quantizer.set_parameters(torch.tensor([0.5, 2.0]), torch.tensor([1, 1]))
    activation = TrainedActivation(quantizer, 0.0, torch.Generator())
    steps = LearnedSteps([activation])
    steps.use()
    x = torch.tensor([[0.6, 3.0], [9.0, -9.0]], requires_grad=True)
    y = activation(x)
    assert torch.equal(y, torch.tensor([[0.5, 4.0], [1.0, -2.0]]))
    y.backward(torch.tensor([[1.0, 1.0], [10.0, 100.0]]))
    # dy / ds: 1 - 1.2 and 2 - 1.5 inside; the bounds 2 and -1 outside; ds / dr = s
    torch.testing.assert_close(steps.values.grad, torch.tensor([0.5 * (-0.2 + 20), 2.0 * (0.5 - 100)]))
    assert torch.equal(x.grad, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))


def test_steps_are_written_and_zero_points_stay():
    quantizers = [AffineQuantizer(4), AffineQuantizer(4, axis=1, groups=3)]
    quantizers[0].set_parameters(torch.tensor([0.5]), torch.tensor([3]))
    quantizers[1].set_parameters(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4, 5, 6]))
    steps = LearnedSteps([TrainedActivation(q, 0.0, torch.Generator()) for q in quantizers])
    with torch.no_grad():
        steps.values.copy_(torch.tensor([2.0, 1.0, 1.0, 0.5]).log())
        steps.write()
    torch.testing.assert_close(quantizers[0].scale, torch.tensor([1.0]))
    torch.testing.assert_close(quantizers[1].scale, torch.tensor([1.0, 2.0, 1.5]))
    assert quantizers[1].zero_point.tolist() == [4, 5, 6]
    assert steps.rate(0.0) == 1.0
    assert steps.rate(0.5) == pytest.approx(0.5)


def test_bound_of_a_format_is_kept():
    quantizer = MatthewQuantizer(4)
    quantizer.observe(torch.tensor([0.0, 1.0]))
    quantizer.set_range_factor(1.1)
    steps = LearnedSteps([TrainedActivation(quantizer, 0.0, torch.Generator())])
    with torch.no_grad():
        steps.values.fill_(-5.0)
        steps.write()
    torch.testing.assert_close(quantizer.scale, torch.tensor([0.9 / 15]))


@pytest.mark.parametrize(("keep_float", "share"), [(0.0, 0.0), (0.25, 0.25), (0.999, 1.0), (1.0, 1.0)])
def test_share_of_elements_that_stay_float(keep_float, share):
    quantizer = AffineQuantizer(2)
    quantizer.set_parameters(torch.tensor([1.0]), torch.tensor([1]))
    activation = TrainedActivation(quantizer, keep_float, torch.Generator().manual_seed(0))
    x = torch.full((101, 99), 0.3)
    y, again = activation(x), activation(x)
    assert set(y.unique().tolist()) <= {0.0, x[0, 0].item()}  # one or the other, nothing between
    assert float((y == x).float().mean()) == pytest.approx(share, abs=0.02)
    assert torch.equal(y, again) == (keep_float in (0.0, 1.0))


def test_stand_ins_take_the_place_of_activation_quantizers_only():
    layer = nn.Linear(3, 2)
    quantizers = {"weight": AffineQuantizer(4), "input": AffineQuantizer(4)}
    to_quantized(layer, quantizers)
    with trained_activations(layer, 0.5, torch.Generator()) as stand_ins:
        assert [s.quantizer for s in stand_ins] == [quantizers["input"]]
        assert layer.quantizers["input"] is stand_ins[0]
        assert layer.quantizers["weight"] is quantizers["weight"]
    assert layer.quantizers["input"] is quantizers["input"]
