"""Products of integer codes on matrix units of int8 and bfloat16 (CPU) and TF32 (CUDA), which compute them exactly.

A code of up to 8 bits, with its zero point taken off, is a whole number of at most 255 and survives bfloat16 and TF32
unchanged; with 7 bits, or around zero, it is an int8 number, too. Sums are kept in float32 (of int8 numbers in int32)
and are exact while they stay within 2^24. So a product of codes has no rounding error at all, where the same product
of fake-quantized values has that of float32, and it takes a fraction of the time. Where the hardware or an old torch
has no such units, the codes are multiplied in float32: the same numbers.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_EXACT = 2**24  # of whole numbers in float32 all up to this one are exact


def exact_in_codes(depth: int, *bits: int) -> bool:
    """Whether a sum of ``depth`` products of codes of these widths is exact, whatever the zero points are."""
    largest = 1
    for width in bits:
        largest *= 2**width - 1
    return depth * largest <= LARGEST_EXACT


@contextlib.contextmanager
def integer_precision() -> Iterator[None]:
    """Context in which float32 tensors are multiplied as narrower ones; for integer codes only."""
    with _set_to(_BACKENDS):
        _active.append(True)
        try:
            yield
        finally:
            _active.pop()


@contextlib.contextmanager
def float32_precision(device: torch.device) -> Iterator[None]:
    """Context in which float32 tensors are multiplied as such: without autocast, and without the TF32 of GPUs.

    Against TF32 it takes torch 2.9; older ones keep what the user has set.

    Args:
        device: of the tensors; others may lie on the CPU.
    """
    with contextlib.ExitStack() as stack:
        for kind in {device.type, "cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_set_to([(backend, "ieee") for backend, _ in _BACKENDS]))
        yield


@contextlib.contextmanager
def _set_to(precisions: list[tuple[Any, str]]) -> Iterator[None]:
    before = [(backend, backend.fp32_precision) for backend, _ in precisions]
    try:
        for backend, precision in precisions:
            backend.fp32_precision = precision
        yield
    finally:
        for backend, precision in before:
            backend.fp32_precision = precision


_active: list[bool] = []  # one entry for each context that is open


def in_integer_precision() -> bool:
    """Whether ``integer_precision`` is on."""
    return bool(_active)


def _has_int8_units() -> bool:
    """Whether this CPU multiplies int8 numbers faster than any others, and torch uses that.

    Kernels of oneDNN for other CPUs, which it can be told to use, add up pairs of products in int16, too few bits for
    the largest codes: so one such product is tried.
    """
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    if supported is None or not supported() or not torch.backends.mkldnn.is_available():
        return False
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) == 64 * 127**2).all())


INT8_UNITS = _has_int8_units()


def linear_of_codes(codes: Tensor, weight: Tensor, int8: bool) -> Tensor:
    """``codes @ weight^T`` of whole numbers in a float dtype, [..., in] and [out, in] -> [..., out].

    Args:
        codes, weight: less their zero points; sums of their products must be exact (``exact_in_codes``). A NaN among
            them counts as some number.
        int8: whether all of them lie in -128..127.
    """
    rows = codes.reshape(-1, codes.shape[-1])
    # torch 2.13's int8 kernel goes by strides, which say nothing of an axis of one element, and then reads elsewhere
    if not (int8 and INT8_UNITS and codes.device.type == "cpu") or 1 in (*rows.shape, len(weight)):
        with integer_precision():
            return F.linear(codes, weight)
    sums = torch._int_mm(rows.to(torch.int8), weight.to(torch.int8).t())  # int32
    return sums.to(codes.dtype).view(*codes.shape[:-1], len(weight))


def _backends() -> list[tuple[Any, str]]:
    """Backends of matrix products and convolutions with their narrow mode; empty before torch 2.9."""
    wanted = [
        (getattr(torch.backends.mkldnn, "matmul", None), "bf16"),
        (getattr(torch.backends.mkldnn, "conv", None), "bf16"),
        (torch.backends.cuda.matmul, "tf32"),
        (getattr(torch.backends.cudnn, "conv", None), "tf32"),
    ]
    return [(backend, precision) for backend, precision in wanted if hasattr(backend, "fp32_precision")]


_BACKENDS = _backends()


def rescale(product: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``product * scale + bias`` in one pass; scale and bias broadcast against the product, which may be reused."""
    return product.mul_(scale) if bias is None else torch.addcmul(bias, product, scale)
