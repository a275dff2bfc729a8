import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grn.data.tokens import pack_bits, unpack_bits
from grn.method import hbq


def quantize_by_the_loop(z, rounds):
    """The definition, round by round: (q, bits round-major)."""
    q, bits = torch.zeros_like(z), []
    for m in range(1, rounds + 1):
        bit = z > q
        q = torch.where(bit, q + 2.0**-m, q - 2.0**-m)
        bits.append(bit.long())
    return q, torch.cat(bits, dim=1)


@pytest.mark.parametrize("rounds", [1, 2, 4, 6])
def test_golden(golden, rounds):
    tensors = {k.split(".")[1]: v for k, v in golden("hbq").items() if k.startswith(f"M{rounds}.")}
    z = tensors["features"]
    torch.testing.assert_close(hbq.quantize(z, rounds), tensors["quantized"], rtol=0, atol=0)
    assert torch.equal(hbq.tokens(z, rounds, "ind"), tensors["index_labels"])
    assert torch.equal(hbq.tokens(z, rounds, "bit"), tensors["bit_labels"])


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=64),
    rounds=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_closed_form_is_the_loop(values, rounds, dtype):
    z = torch.tensor(values, dtype=dtype).view(1, -1, 1)
    q, bits = quantize_by_the_loop(z, rounds)
    assert torch.equal(hbq.quantize(z, rounds), q)
    assert torch.equal(hbq.tokens(z, rounds, "bit"), bits)
    assert ((z.double() - q.double()).abs() <= 2.0**-rounds).all()
    for labeling in ("ind", "bit"):
        tokens = hbq.tokens(z, rounds, labeling)
        assert torch.equal(hbq.dequantize(tokens, rounds, labeling, dtype), q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounds", range(1, 9))
def test_bin_edges_and_ends(rounds, dtype):
    edges = torch.arange(-(2 ** (rounds - 1)), 2 ** (rounds - 1) + 1, dtype=dtype) / 2 ** (rounds - 1)
    tiny = torch.tensor([-1e-30, 0.0, 1e-30], dtype=dtype)  # z > q is strict, however close z is
    z = torch.cat([edges, tiny]).view(1, -1, 1)
    assert torch.equal(hbq.quantize(z, rounds), quantize_by_the_loop(z, rounds)[0])


@pytest.mark.parametrize("rounds", range(1, 9))
def test_every_token_survives_the_round_trip(rounds):
    index = torch.arange(2**rounds).view(1, 1, -1).repeat(2, 3, 1)
    assert torch.equal(hbq.tokens(hbq.dequantize(index, rounds, "ind"), rounds, "ind"), index)
    bits = hbq.index_to_bits(index, rounds)
    assert bits.shape == (2, 3 * rounds, 2**rounds)
    assert torch.equal(hbq.bits_to_index(bits, rounds), index)
    assert torch.equal(hbq.tokens(hbq.dequantize(bits, rounds, "bit"), rounds, "bit"), bits)


def test_bits_are_round_major_most_significant_first():
    index = torch.tensor([[8, 1]]).view(1, 2, 1)  # 1000 and 0001
    assert hbq.index_to_bits(index, 4).flatten().tolist() == [1, 0, 0, 0, 0, 0, 0, 1]


def test_gradient_passes_straight_through():
    z = torch.linspace(-1, 1, 11, requires_grad=True)
    weight = torch.arange(11.0)
    (hbq.quantize(z, 3) * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_video_features_keep_their_shape():
    z = torch.rand(2, 5, 3, 4, 4) * 2 - 1
    assert hbq.tokens(z, 4, "ind").shape == (2, 5, 3, 4, 4)
    assert hbq.tokens(z, 4, "bit").shape == (2, 20, 3, 4, 4)
    assert hbq.num_tokens(5, 4, "ind") == (5, 16)
    assert hbq.num_tokens(5, 4, "bit") == (20, 2)


@pytest.mark.parametrize("rounds", [0, 9])
def test_rounds_out_of_range(rounds):
    with pytest.raises(ValueError, match=r"rounds must be in 1\.\.8"):
        hbq.quantize(torch.zeros(1), rounds)
    with pytest.raises(ValueError, match="labeling must be"):
        hbq.tokens(torch.zeros(1, 1), 4, "byte")


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    channels=st.integers(1, 20),
    rounds=st.integers(1, 8),
    shape=st.lists(st.integers(1, 3), min_size=0, max_size=3),
)
def test_packed_bits_are_numpys_and_come_back(seed, channels, rounds, shape):
    z = torch.rand(2, channels, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    bits = hbq.tokens(z, rounds, "bit")
    packed = pack_bits(bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, *shape, -(-channels * rounds // 8))
    assert (packed.numpy() == np.packbits(bits.movedim(1, -1).numpy().astype(bool), axis=-1)).all()
    for labeling in ("ind", "bit"):
        assert torch.equal(unpack_bits(packed, channels, rounds, labeling), hbq.tokens(z, rounds, labeling))
