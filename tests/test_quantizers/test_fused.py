"""One kernel gives the bits of the plain formula, and a compiler that fails is no failure."""

import warnings

import pytest
import torch

from apq_mmdet.quantizers import AffineQuantizer
from apq_mmdet.quantizers.affine import shifted_codes
from apq_mmdet.quantizers.fused import Fused


def operands(groups=1):
    x = torch.randn(64, 5, 33)
    quantizer = AffineQuantizer(4, axis=1, groups=groups)
    quantizer.observe(x)
    quantizer.set_range_factor(0.8)
    return quantizer, x


def test_compiled_bits_are_those_of_the_plain_formula():
    fused = Fused(shifted_codes.function, devices=("cpu",))
    for groups in (1, 5):
        quantizer, x = operands(groups)
        found = fused(x, *quantizer._bounds(x))
        assert not fused._failed
        assert torch.equal(found, (quantizer.encode(x) - quantizer.per_element(quantizer.zero_point, x)).float())


def test_any_layout_of_operands_is_no_failure_of_the_compiler(monkeypatch):
    """Bounds are tensors on a GPU, queries and keys come permuted, and there are more ranks and sizes than kernels."""
    traced = []
    compiled = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **kwargs: compiled(
            function, dynamic=True, backend=lambda graph, _: traced.append(graph) or graph.forward
        ),
    )
    fused = Fused(shifted_codes.function, devices=("cpu",))
    low, high = torch.full((1,), -3.0), torch.full((1,), 12.0)
    for shape in ((6,), (3, 5), (4, 3, 5), (2, 4, 3, 5), (2, 2, 4, 3, 5), (1, 3), (3, 1), (1, 1, 3), (2, 1, 3), (7, 2)):
        for x in (torch.randn(shape), torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))):
            want = torch.clamp(torch.round(x / 0.3), -3, 12)
            assert torch.equal(fused(x, torch.full((1,), 0.3), low, high), want)
    assert not fused._failed
    assert traced
    assert all("out" not in node.kwargs for graph in traced for node in graph.graph.nodes)


def test_other_devices_run_the_function_as_written():
    calls = []
    fused = Fused(lambda x: calls.append(x) or x + 1)
    assert torch.equal(fused(torch.ones(2)), torch.full((2,), 2.0))
    assert len(calls) == 1


@pytest.mark.parametrize("when", ["at once", "at the first call"])
def test_a_compiler_that_fails_is_warned_of_once(when, monkeypatch):
    tried = []

    def broken(*_, **__):
        tried.append(when)
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken if when == "at once" else lambda *_, **__: broken)
    fused = Fused(lambda x: x * 2, devices=("cpu",))
    with pytest.warns(UserWarning, match="no compiler here"):
        assert torch.equal(fused(torch.ones(2)), torch.full((2,), 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fused(torch.ones(2)), torch.full((2,), 2.0))
    assert len(tried) == 1


def test_memory_that_is_not_enough_is_no_failure_of_the_compiler(monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: full)
    fused = Fused(lambda x: x * 2, devices=("cpu",))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fused(torch.ones(2))
    assert not fused._failed
