"""Text refiners in training: packs of many sizes, an encoder trained along or frozen, prompts by number, shards."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from grn.data.text_images import Packs
from grn.errors import UserError
from grn.networks.captioned_refiner import CaptionedRefiner
from grn.networks.text_encoder import ByteT5
from grn.networks.text_refiner import TextRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.sampler import Linear, Sampler
from grn.training import TextRefinerModule
from grn.training.fsdp import FSDP, gather_weights, local, release_weights

SIZES = {
    "channels": 3,
    "classes": 4,
    "depth": 2,
    "width": 24,
    "heads": 2,
    "text_width": 16,
    "max_text": 32,
    "mlp_ratio": 11,
}
ENCODER = {"width": 16, "depth": 1, "heads": 2, "hidden": 16, "max_length": 32}
PROMPTS = ["a seven", "a three left of an eight", ""]


def network(frozen=False):
    made = CaptionedRefiner(TextRefiner(**SIZES), None if frozen else ByteT5(**ENCODER))
    made.init_weights(torch.Generator().manual_seed(3))
    torch.nn.init.normal_(made.refiner.head.out.weight, std=0.2, generator=torch.Generator().manual_seed(4))
    return made


def build(frozen=False, **changes):
    torch.manual_seed(0)
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 2), blocks_per_stage=1, temporal=(False,)
    )
    encoder = ByteT5(**ENCODER).requires_grad_(False).eval() if frozen else None
    arguments = {"prompts": PROMPTS, "size": (16, 32), "labeling": "ind", "text_encoder": encoder} | changes
    module = TextRefinerModule(network(frozen), tokenizer, Sampler(Linear(3), guidance=2.0), **arguments)
    module._trainer = SimpleNamespace(
        world_size=1, global_rank=0, accumulate_grad_batches=1, global_step=5, log_every_n_steps=1000,
        precision_plugin=SimpleNamespace(forward_context=torch.no_grad), barebones=False,
    )  # fmt: skip
    return module


def packs():
    generator = torch.Generator().manual_seed(0)
    sizes = [[(16, 16), (16, 32), (16, 16)], [(32, 16)], [(16, 32), (16, 32)]]
    samples = [
        [
            {
                "pixels": torch.randint(256, (3, 1, *size), dtype=torch.uint8, generator=generator),
                "caption": PROMPTS[place % 3],
                "key": f"{number}-{place}",
                "tokens": size[0] * size[1] // 16 + 1 + len(PROMPTS[place % 3].encode()) + 1,
            }
            for place, size in enumerate(pack)
        ]
        for number, pack in enumerate(sizes)
    ]
    return Packs(100)(samples)


def logged(module):
    logs = {}
    module.log = lambda name, value, **_: logs.setdefault(name, value)
    return logs


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_is_the_mean_of_packs_and_trains_what_is_not_frozen(frozen):
    module, batch = build(frozen).train(), packs()
    logs = logged(module)
    loss = module.training_step(batch, 0)
    assert logs["train/packing"] == batch["tokens"] / 300
    loss.backward()
    trained = {name for name, p in module.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in module.named_parameters() if p.requires_grad}
    assert any("network.encoder" in name for name in trained) != frozen
    assert not any("frozen_encoder" in name or "tokenizer" in name for name in trained)

    # Pack by pack, with the same draws: positions are what they are drawn by.
    tokens, losses, start = module.tokenize(batch), [], 0
    for number, count in enumerate(batch["packs"]):
        own = slice(start, start + count)
        ids = number * 2**16 + torch.arange(count)
        _, logits = module.predict_corrupted(
            tokens[own], batch["caption"][own], seed=0, ids=ids, step=5, context=[0] * count
        )
        flat = torch.cat([sample.flatten(1) for sample in logits], dim=1).T
        losses.append(F.cross_entropy(flat, torch.cat([sample.flatten() for sample in tokens[own]])))
        start += count
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def clip_pack():
    """Clips of three lengths, and an image."""
    generator = torch.Generator().manual_seed(1)
    return {
        "pixels": [
            torch.randint(256, (3, frames, 16, 16), dtype=torch.uint8, generator=generator) for frames in (9, 1, 5, 9)
        ],
        "caption": [PROMPTS[0]] * 4,
        "key": list("abcd"),
        "packs": [4],
        "tokens": 200,
        "max_tokens": 200,
    }


def build_video(**changes):
    module = build(frames=9, size=(16, 16), **changes)
    module.tokenizer = HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 2, 2), blocks_per_stage=1,
        temporal=(True, True),
    ).eval().requires_grad_(False)  # fmt: skip
    return module


def test_given_latents_stay_true_and_count_for_nothing():
    module, batch = build_video(context_latents=1, context_ratio=1.0), clip_pack()
    tokens = module.tokenize(batch)
    assert [tuple(sample.shape) for sample in tokens] == [(3, 3, 2, 2), (3, 1, 2, 2), (3, 2, 2, 2), (3, 3, 2, 2)]
    assert module.token_shape == (3, 3, 2, 2)
    ids = torch.arange(4)
    context = module.draw_context(tokens, ids)
    assert context == [1, 0, 1, 1]
    seen = {}
    module.network.forward = lambda noisy, t, text, context_frames: seen.update(noisy=noisy, context=context_frames)
    module.predict_corrupted(tokens, batch["caption"], seed=0, ids=ids, step=5, context=context)
    assert seen["context"] == context
    for noisy, true, given in zip(seen["noisy"], tokens, context):
        assert torch.equal(noisy[:, :given], true[:, :given])
        assert not torch.equal(noisy[:, given:], true[:, given:])

    module = build_video(context_latents=1, context_ratio=1.0)
    logged(module)
    loss = module.training_step(batch, 0)
    _, logits = module.predict_corrupted(tokens, batch["caption"], seed=0, ids=ids, step=5, context=context)
    flat = torch.cat([sample.flatten(1) for sample in logits], dim=1).T
    target = torch.cat([sample[:, given:].flatten() for sample, given in zip(tokens, context)])
    torch.testing.assert_close(loss, F.cross_entropy(flat, target), atol=1e-5, rtol=1e-5)


def test_a_share_of_clips_has_given_latents_and_each_number_is_as_likely():
    tokens = [torch.zeros(3, 3, 1, 1, dtype=torch.long)] * 3000
    for most, expected in ((1, [2100, 900, 0]), (2, [2100, 450, 450]), (9, [2100, 100, 800])):
        given = build_video(context_latents=most, context_ratio=0.3).draw_context(tokens, torch.arange(3000))
        assert [given.count(number) for number in range(3)] == pytest.approx(expected, abs=90)
    assert set(build_video(context_latents=0).draw_context(tokens, torch.arange(3000))) == {0}
    with pytest.raises(UserError, match=r"training\.context_ratio=1\.5 must lie in 0 to 1"):
        build(context_ratio=1.5)
    with pytest.raises(UserError, match=r"training\.context_latents=-1 must not be negative"):
        build(context_latents=-1)


def test_frames_that_no_tokenizer_has_are_refused():
    module = build_video()
    module.frames = 8
    with pytest.raises(UserError, match="8 frames are not 1"):
        _ = module.token_shape


def test_streamed_clips_are_those_that_are_decoded():
    module = build_video().eval()
    tokens = torch.randint(4, (2, *module.token_shape), generator=torch.Generator().manual_seed(0))
    frames = torch.stack(list(module.decode_stream(tokens)), dim=2)
    assert frames.shape == (2, 3, 9, 16, 16)
    assert (frames.int() - module.decode(tokens).int()).abs().max() <= 1


def test_tokens_keep_their_places_among_sizes():
    module, batch = build(), packs()
    for pixels, tokens in zip(batch["pixels"], module.tokenize(batch)):
        (alone,) = module.tokenize({"pixels": [pixels]})
        assert torch.equal(tokens, alone)


@pytest.mark.parametrize("ranks", [1, 3])
def test_no_two_samples_of_a_step_share_their_draws(ranks):
    module, sizes = build(), [[3, 1], [2, 2], [5, 4]]
    of_ranks = []
    for rank in range(ranks):
        module._trainer = SimpleNamespace(world_size=ranks, global_rank=rank, accumulate_grad_batches=2)
        for batch_idx in range(2):
            of_ranks.append(module._pack_positions(batch_idx, sizes[rank]))
    ids = torch.cat(of_ranks).tolist()
    assert len(set(ids)) == len(ids)
    assert max(ids) < 2**32


def test_flop_grow_with_pictures_and_texts():
    module, batch = build(), packs()
    module.setup("fit")
    few = module.flop_per_sample(batch)
    large = batch | {"pixels": [torch.cat([pixels] * 2, dim=-1) for pixels in batch["pixels"]]}
    large["tokens"] += sum(pixels[0].numel() // 16 for pixels in batch["pixels"])
    assert 1.6 * few < module.flop_per_sample(large) < 3 * few
    assert few < module.flop_per_sample(batch | {"tokens": batch["tokens"] + 16 * 6})
    assert not any("_hollow" in name for name in module.state_dict())


@pytest.mark.parametrize("frozen", [False, True])
def test_samples_are_of_their_prompts(frozen):
    module = build(frozen).eval()
    labels, ids = torch.tensor([0, 1, 2, 1]), torch.arange(4)
    whole = module.generate(labels, seed=5, ids=ids).tokens
    assert whole.shape == (4, 3, 1, 4, 8)
    assert module.decode(whole).shape == (4, 3, 1, 16, 32)
    assert torch.equal(module.generate(labels[1:3], seed=5, ids=ids[1:3]).tokens, whole[1:3])
    module.prompts = ["a three left of an eight"]
    assert torch.equal(module.generate(labels[:1], seed=5, ids=ids[1:2]).tokens, whole[1:2])
    module.negative_prompt = "a seven"
    assert not torch.equal(module.generate(labels[:1], seed=5, ids=ids[1:2]).tokens, whole[1:2])
    module.size = (24, 16)
    assert module.generate(labels[:1], seed=5, ids=ids[:1]).tokens.shape == (1, 3, 1, 6, 4)
    module.size = (24, 18)
    with pytest.raises(UserError, match="multiples of the tokenizer's stride 4"):
        module.generate(labels[:1], seed=5, ids=ids[:1])


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpoints_hold_what_is_trained(frozen):
    module = build(frozen)
    checkpoint = {"state_dict": module.state_dict()}
    whole = set(checkpoint["state_dict"])
    module.on_save_checkpoint(checkpoint)
    parts = {".".join(name.split(".")[:2]) for name in checkpoint["state_dict"]}
    assert parts == ({"network.refiner"} if frozen else {"network.refiner", "network.encoder"})
    module.on_load_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == whole


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompts": []}, r"training\.prompts is empty"),
        ({"frozen": True, "text_encoder": None}, "a text refiner needs one"),
        ({"prompts": "abc"}, r"^training\.prompts=abc: a list of texts"),
        ({"prompts": [3]}, r"^training\.prompts=\[3\]: a list of texts"),
        ({"prompts": None}, r"^training\.prompts=None: a list of texts"),
        ({"negative_prompt": None}, r"^training\.negative_prompt=None must be a text"),
        ({"size": 32}, r"^training\.size=32: height and width in pixels"),
        ({"size": [32]}, r"^training\.size=\[32\]: height and width in pixels"),
        ({"size": [32, "x"]}, r"^training\.size=.*: height and width in pixels"),
        ({"size": [30, 64]}, r"^training\.size=\[30, 64\] .* multiples of the tokenizer's stride 4, got \(30, 64\)$"),
        ({"frames": "x"}, r"^training\.frames=x: a whole number"),
        ({"frames": 0}, r"^training\.frames=0: a whole number"),
        ({"context_ratio": "a"}, r"^training\.context_ratio=a must lie in 0 to 1"),
        ({"context_latents": None}, r"^training\.context_latents=None must not be negative, and whole"),
        ({"labeling": "bit"}, r"training\.labeling=bit of 3 channels .* needs model\.channels=6"),
    ],
)
def test_mistakes_name_the_keys(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        build(**changes)


def test_features_must_fit():
    with pytest.raises(UserError, match=r"model\.text_width=16 does not fit the text encoder, .* 8 wide"):
        CaptionedRefiner(TextRefiner(**SIZES), ByteT5(**ENCODER | {"width": 8}))
    with pytest.raises(UserError, match=r"text_encoder\.max_length=64 is more than model\.max_text=32"):
        CaptionedRefiner(TextRefiner(**SIZES), ByteT5(**ENCODER | {"max_length": 64}))


def test_a_new_network_knows_nothing_yet():
    module = build()
    module.network.init_weights(torch.Generator().manual_seed(0))
    logged(module)
    assert module.training_step(packs(), 0).item() == pytest.approx(math.log(4), abs=1e-5)
    stds = {name: p.std().item() for name, p in module.network.encoder.named_parameters() if p.ndim == 2}
    assert 0.8 < stds["encoder.embed_tokens.weight"] < 1.2
    assert 0.15 < stds["encoder.block.0.layer.0.SelfAttention.k.weight"] < 0.35


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    with torch.device("meta"):
        sharded = CaptionedRefiner(TextRefiner(**SIZES), ByteT5(**ENCODER))
    strategy = FSDP()
    strategy._device_mesh, strategy.parallel_devices = mesh, [torch.device("cpu")]
    strategy.cluster_environment = SimpleNamespace(local_rank=lambda: 0)
    strategy.precision_plugin = SimpleNamespace(precision="32-true")
    expected = network()
    strategy.shard(sharded, expected.state_dict())
    names = dict(expected.named_parameters())
    assert {name for name, _ in sharded.named_parameters()} == set(names)
    for name, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor)
        assert len(local(parameter)) <= -(-len(parameter) // 2)
        assert torch.equal(parameter.full_tensor(), names[name]), name

    tokens = [torch.arange(24).view(3, 1, 2, 4) % 4, torch.arange(12).view(3, 1, 2, 2) % 4]
    t = torch.tensor([0.2, 0.7])
    for made in (sharded, expected):
        sum(logits.square().mean() for logits in made(tokens, t, PROMPTS[:2])).backward()
    for name, parameter in sharded.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), names[name].grad, msg=name, atol=1e-5, rtol=1e-4)

    # Sampling, each rank as often as it likes, while the network is whole.
    module = build()
    whole = module.generate(torch.tensor([0, 1]), seed=1, ids=torch.arange(2)).tokens
    module.network = sharded
    with torch.no_grad():
        gather_weights(sharded)
        for _ in range(rank + 1):
            assert torch.equal(module.generate(torch.tensor([0, 1]), seed=1, ids=torch.arange(2)).tokens, whole)
        release_weights(sharded)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())

    with torch.device("meta"):
        first = CaptionedRefiner(TextRefiner(**SIZES), ByteT5(**ENCODER))
    strategy.shard(first, seed=3)
    expected.init_weights(torch.Generator().manual_seed(3))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter.full_tensor(), names[name]), name
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_hold_the_network_of_one(tmp_path):
    torch.multiprocessing.spawn(run_rank, (tmp_path,), nprocs=2)
