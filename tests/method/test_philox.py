import pytest
import torch

from grn.method import philox
from grn.method.philox import Stream


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the published test vectors of philox4x32-10 (Random123)
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, expected):
    words = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(key))
    assert [int(w) for w in words] == expected


def test_rows_depend_on_their_id_alone():
    whole = philox.uniform(7, Stream.TOKENS, torch.arange(20), 3, (5, 6))
    some = philox.uniform(7, Stream.TOKENS, torch.tensor([13, 2]), 3, (5, 6))
    assert torch.equal(some, whole[[13, 2]])


def test_steps_may_differ_by_sample():
    ids, steps = torch.tensor([3, 3, 2**32 - 1, 0]), torch.tensor([0, 7, 2**32 - 1, 1])
    mixed = philox.uniform(5, Stream.TOKENS, ids, steps, (3, 5))
    for row, (sample, step) in enumerate(zip(ids, steps)):
        assert torch.equal(mixed[row], philox.uniform(5, Stream.TOKENS, sample[None], step.item(), (3, 5))[0])
    same = philox.integers(5, Stream.NOISE, ids, torch.full((4,), 9), (7,), 16)
    assert torch.equal(same, philox.integers(5, Stream.NOISE, ids, 9, (7,), 16))


def test_every_coordinate_matters():
    ids = torch.arange(4)
    base = philox.uniform(1, Stream.KEEP, ids, 0, (64,))
    others = [
        philox.uniform(2, Stream.KEEP, ids, 0, (64,)),
        philox.uniform(1 + 2**32, Stream.KEEP, ids, 0, (64,)),
        philox.uniform(1, Stream.NOISE, ids, 0, (64,)),
        philox.uniform(1, Stream.KEEP, ids, 1, (64,)),
        philox.uniform(1, Stream.KEEP, ids + 4, 0, (64,)),
    ]
    for other in others:
        assert (base == other).float().mean() < 0.01


def test_distributions():
    ids = torch.arange(200)
    u = philox.uniform(0, Stream.KEEP, ids, 0, (500,))
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005
    assert abs(u.var() - 1 / 12) < 0.002
    n = philox.normal(0, Stream.KEEP, ids, 0, (500,))
    assert n.isfinite().all()
    assert abs(n.mean()) < 0.02
    assert abs(n.std() - 1) < 0.02
    counts = philox.integers(0, Stream.KEEP, ids, 0, (500,), 16).flatten().bincount(minlength=16)
    assert len(counts) == 16
    assert (counts / 100_000 - 1 / 16).abs().max() < 0.004


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, -1, 2**63 - 1])
def test_a_seed_may_be_a_tensor(seed):
    ids = torch.arange(5)
    drawn = [philox.uniform(given, Stream.NOISE, ids, 3, (7,)) for given in (seed, torch.tensor(seed))]
    assert torch.equal(*drawn)
