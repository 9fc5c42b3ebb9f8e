"""Dense packing of k-bit codes into bytes: two 4-bit codes a byte, four 6-bit codes in three bytes."""

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes in 0..2^bits - 1 of any shape into uint8 [ceil(numel * bits / 8)], lowest bit first."""
    flat = codes.reshape(-1, 1).to(torch.uint8)  # [n, 1]
    planes = (flat >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1  # [n, bits]
    stream = planes.reshape(-1)
    stream = torch.cat([stream, stream.new_zeros(-stream.numel() % 8)]).view(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (stream * weights).sum(1, dtype=torch.uint8)


def packed_size(numel: int, bits: int) -> int:
    """Bytes that ``numel`` codes of ``bits`` bits take."""
    return (numel * bits + 7) // 8


def unpack_codes(packed: Tensor, bits: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Inverse of :func:`pack_codes`: int32 codes of the given shape.

    Raises:
        ValueError: the byte count does not fit shape and bits.
    """
    numel = torch.Size(shape).numel()
    if packed.numel() != packed_size(numel, bits):
        raise ValueError(
            f"{packed.numel()} bytes of packed codes, but {numel} codes of {bits} bits take {packed_size(numel, bits)}"
        )
    stream = (packed.view(-1, 1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    planes = stream.reshape(-1)[: numel * bits].view(numel, bits).to(torch.int32)
    weights = 2 ** torch.arange(bits, dtype=torch.int32, device=packed.device)
    return (planes * weights).sum(1, dtype=torch.int32).view(shape)
