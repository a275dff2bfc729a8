import torch

from grn.networks.rotary import rotary_2d, rotary_3d, rotate


def test_products_depend_on_the_offset_alone():
    cos, sin = rotary_2d(5, 5, 16)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    turned_q = rotate(q.expand(25, 16), cos.double(), sin.double()).double()
    turned_k = rotate(k.expand(25, 16), cos.double(), sin.double()).double()
    products = (turned_q @ turned_k.T).view(5, 5, 5, 5)
    torch.testing.assert_close(products[:4, :4, :4, :4], products[1:, 1:, 1:, 1:], atol=1e-4, rtol=1e-4)


def test_turning_keeps_lengths_and_the_origin():
    cos, sin = rotary_2d(3, 4, 8)
    x = torch.randn(2, 12, 8)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])
    assert not torch.allclose(turned[:, 1], x[:, 1])


def test_first_half_turns_with_the_row_second_with_the_column():
    cos, _ = rotary_2d(3, 4, 8)
    cos = cos.view(3, 4, 4)
    assert (cos[:, :1, :2] == cos[:, 1:, :2]).all()
    assert (cos[:1, :, 2:] == cos[1:, :, 2:]).all()


def test_bfloat16_is_turned_in_float32():
    cos, sin = rotary_2d(2, 2, 8)
    x = torch.randn(4, 8).bfloat16()
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())


def test_three_axes_turn_their_own_frequencies():
    positions = torch.tensor([[5, 0, 0], [0, 5, 0], [0, 0, 5], [600, 2, 3]])
    cos, sin = rotary_3d(positions, 16)  # of 8 frequencies 2, 2 and 4
    expected = torch.zeros(4, 8, dtype=torch.float64)
    for axis, (start, count) in enumerate([(0, 2), (2, 2), (4, 4)]):
        for i in range(count):
            expected[:, start + i] = positions[:, axis] * 1e4 ** (-i / count)
    torch.testing.assert_close(cos, expected.cos().float(), atol=1e-7, rtol=0)
    torch.testing.assert_close(sin, expected.sin().float(), atol=1e-7, rtol=0)
