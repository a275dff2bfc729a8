import os
import socket

import commands
import pytest
import torch

from grn.method.sampler import Sampler
from grn.method.schedules import EntropyGuided, Linear
from grn.networks.class_refiner import ClassRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError
from grn.runtime.ranks import LAUNCHERS, join, rank_and_world_size
from grn.sampling.bundle import RefinerBundle
from grn.sampling.generation import generate
from grn.sampling.request import Request

GUIDED = Sampler(EntropyGuided(warmup=1, scale=150.0, offset=-137.0, min_steps=2, max_steps=8), guidance=1.5)


def tiny_bundle(sampler):
    torch.manual_seed(0)
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 2), blocks_per_stage=1, temporal=(False,)
    )
    network = ClassRefiner(
        channels=3, classes=4, num_labels=5, size=4, depth=1, width=16, heads=2, bottleneck=8, context_start=0
    )
    generator = torch.Generator().manual_seed(0)  # entropies, and so plans, hang on these numbers
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return RefinerBundle(network.double(), tokenizer, sampler).eval()


def test_labels_take_turns():
    (batch,) = generate(tiny_bundle(GUIDED), Request(labels=(3, 0, 4), num=7), batch_size=7)
    assert batch.labels.tolist() == [3, 0, 4, 3, 0, 4, 3]


@pytest.mark.parametrize("sampler", [Sampler(Linear(3)), GUIDED], ids=["linear", "entropy"])
def test_images_do_not_depend_on_batches_or_ranks(sampler):
    bundle = tiny_bundle(sampler)
    labels, request = torch.tensor([0, 1, 2, 3, 4, 0, 1]), Request(num=7, seed=2)
    (whole,) = generate(bundle, request, batch_size=7)
    assert whole.images.shape == (7, 3, 16, 16)
    assert whole.images.dtype == torch.uint8
    assert whole.refined.steps.unique().numel() > (sampler is GUIDED)
    for ranks in (1, 2, 9):
        tokens = torch.full_like(whole.refined.tokens, -1)
        for rank in range(ranks):
            for batch in generate(bundle, request, batch_size=2, rank=rank, world_size=ranks):
                assert len(batch.ids) <= 2
                tokens[batch.ids] = batch.refined.tokens
                assert torch.equal(batch.labels, labels[batch.ids])
                assert torch.equal(batch.images, bundle.decode(batch.refined.tokens)[:, :, 0])
        assert torch.equal(tokens, whole.refined.tokens)


def test_the_first_batch_is_watched_to_its_end():
    bundle, alone, among = tiny_bundle(GUIDED), [], []
    bundle.generate(Request(num=4, seed=2), callback=alone.append)
    batches = list(generate(bundle, Request(num=12, seed=2), batch_size=4, watch_first=among.append))
    assert sum(len(batch.ids) for batch in batches) == 12
    assert len(among) == len(alone)
    for a, b in zip(alone, among):
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.predicted, b.predicted)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_network_sees_few_sizes(compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # a hook sees all calls, where a graph would not
    bundle, seen = tiny_bundle(GUIDED), set()
    if compiled:
        bundle.network.compile()
    bundle.network.register_forward_pre_hook(lambda _, given: seen.add(len(given[0])))
    list(generate(bundle, Request(num=40, seed=2), batch_size=24))
    assert all(size % 3 == 0 for size in seen) == compiled


def sample_as_rank(rank, folder, port):
    os.environ |= dict(zip(LAUNCHERS[0], (str(rank), str(rank), "2")))
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    join(torch.device("cpu"))
    torch.set_num_threads(1)
    rank, world_size = rank_and_world_size()
    batches = generate(tiny_bundle(GUIDED), Request(num=9, seed=2), batch_size=2, rank=rank, world_size=world_size)
    torch.save(gathered(batches), folder / f"{rank}.pt")


def gathered(batches):
    ids, tokens, steps = zip(*((batch.ids, batch.refined.tokens, batch.refined.steps) for batch in batches))
    return {"ids": torch.cat(ids), "tokens": torch.cat(tokens), "steps": torch.cat(steps)}


@pytest.mark.slow
def test_two_processes_draw_the_same_tokens(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands.spawn(sample_as_rank, (tmp_path, port), nprocs=2)
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [share["ids"].sort().values.tolist() for share in shares] == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]
    ids = torch.cat([share["ids"] for share in shares])
    (whole,) = generate(tiny_bundle(GUIDED), Request(num=9, seed=2), batch_size=9)
    for name in ("tokens", "steps"):
        assert torch.equal(torch.cat([share[name] for share in shares]), getattr(whole.refined, name)[ids])


def test_a_batch_holds_a_sample():
    with pytest.raises(UserError, match=r"^batch_size=0 must be a whole number, at least 1"):
        next(generate(tiny_bundle(GUIDED), Request(), batch_size=0))
