"""Packing against an independent bit-by-bit definition, and against compressed-tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modelopt.core.errors import ShapeError
from modelopt.numerics.packing import pack_bits, packed_size, unpack_bits


def by_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Write every code's bits, lowest first, one after another, and fill whole bytes."""
    stream = ((codes[..., None] >> np.arange(bits)) & 1).reshape(*codes.shape[:-1], -1)
    return np.packbits(stream.astype(np.uint8), axis=-1, bitorder="little")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 16), (5, 64), (4, 0), (2, 33)])
def test_pack_is_a_little_endian_bit_stream_and_unpack_its_inverse(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape[-1] == packed_size(shape[-1], bits)
    assert np.array_equal(packed.numpy(), by_bits(codes.numpy(), bits).reshape(packed.shape))
    assert torch.equal(unpack_bits(packed, bits, shape[-1]), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_the_int32_words_of_compressed_tensors(bits):
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
    )
    codes = torch.randint(0, 2**bits, (6, 96), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits)
    assert torch.equal(pack_bits(codes, bits), theirs.view(torch.uint8))


def test_bad_input_is_refused():
    with pytest.raises(ShapeError, match="uint8"):
        pack_bits(torch.zeros(3), 4)
    with pytest.raises(ShapeError, match="bytes"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 4, 9)
