import pytest
import torch

from apq_mmdet.quantizers import pack_codes, unpack_codes


def slow_pack(codes, bits):
    """One long binary number, lowest code first, cut into bytes."""
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes.reshape(-1)))
    return list(number.to_bytes((codes.numel() * bits + 7) // 8, "little"))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 2, 3, 3)])
def test_against_a_big_integer(bits, shape):
    codes = torch.randint(0, 2**bits, shape)
    packed = pack_codes(codes, bits)
    assert packed.tolist() == slow_pack(codes, bits)
    assert torch.equal(unpack_codes(packed, bits, shape), codes.int())


def test_four_bits_take_half_a_byte():
    assert pack_codes(torch.tensor([1, 2, 15, 0]), 4).tolist() == [0x21, 0x0F]


def test_wrong_size_is_refused():
    with pytest.raises(ValueError, match="4 codes of 4 bits take 2"):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 4, (4,))
