"""Text refiners in training: packs of many sizes, an encoder trained along or frozen, prompts by number, shards."""

import copy
import functools
import math
from types import SimpleNamespace

import commands
import pytest
import torch
import torch.distributed as dist
from lightning import Trainer
from sharding import meet, strategy
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from grn.data.text_images import Packs
from grn.method import philox
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.networks.captioned_refiner import CaptionedRefiner
from grn.networks.text_encoder import ByteT5
from grn.networks.text_refiner import TextRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError
from grn.sampling.refinement import Start
from grn.sampling.request import Request
from grn.sampling.text_bundle import TextRefinerBundle
from grn.training import TextRefinerModule
from grn.training.fsdp import gather_weights, local, release_weights

SIZES = {
    "channels": 3,
    "classes": 4,
    "depth": 2,
    "width": 24,
    "attention": "one_way",
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


def build(frozen=False, *, multipliers=(1, 2), temporal=(False,), **changes):
    torch.manual_seed(0)
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=multipliers, blocks_per_stage=1,
        temporal=temporal,
    )  # fmt: skip
    encoder = ByteT5(**ENCODER).requires_grad_(False).eval() if frozen else None
    arguments = {"prompts": PROMPTS, "size": (16, 32), "labeling": "ind", "text_encoder": encoder} | changes
    training = {key: arguments.pop(key) for key in arguments.keys() - {*TextRefinerBundle.settings, "text_encoder"}}
    bundle = TextRefinerBundle(network(frozen), tokenizer, Sampler(Linear(3), guidance=2.0), **arguments)
    module = TextRefinerModule(bundle, **training)
    module._trainer = SimpleNamespace(
        world_size=1, global_rank=0, accumulate_grad_batches=1, global_step=5, log_every_n_steps=1000,
        precision_plugin=SimpleNamespace(forward_context=torch.no_grad), barebones=False,
        strategy=SimpleNamespace(reduce=lambda tensor, reduce_op: tensor),
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


@pytest.mark.parametrize("power", [0, 0.5])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_weighs_samples_and_trains_what_is_not_frozen(frozen, power):
    module, batch = build(frozen, sample_weight_power=power).train(), packs()
    logs = logged(module)
    loss = module.training_step(batch, 0)
    assert logs["train/packing"] == batch["tokens"] / 300
    loss.backward()
    trained = {name for name, p in module.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in module.named_parameters() if p.requires_grad}
    assert any("network.encoder" in name for name in trained) != frozen
    assert not any("frozen_encoder" in name or "tokenizer" in name for name in trained)
    torch.testing.assert_close(loss, step_loss(module, [(batch, 0, 0)], power, step=5), atol=1e-5, rtol=1e-5)


def step_loss(module, batches, power, *, step, ranks=1, accumulated=1):
    """The loss of a step by the formula; `batches`: (batch, its number in the step, rank)."""
    losses, weights = [], []
    for batch, number, rank in batches:
        tokens, start = module.tokenize(batch), 0
        for place, count in enumerate(batch["packs"]):
            own = slice(start, start + count)
            position = number * ranks * len(batch["packs"]) + rank + ranks * place
            _, logits = module.predict_corrupted(
                tokens[own],
                batch["caption"][own],
                seed=0,
                ids=position * 2**16 + torch.arange(count),
                step=step,
                context=[0] * count,
            )
            for true, predicted in zip(tokens[own], logits):
                right = torch.log_softmax(predicted, dim=0).gather(0, true[None])  # [1, D, T, h, w]
                losses.append(-right.mean())
                weights.append(math.prod(true.shape[1:]) ** power)
            start += count
    return sum(w * loss for w, loss in zip(weights, losses)) / sum(weights)


class OfRanks(torch.utils.data.IterableDataset):
    """Packs of other sizes on every rank and in every batch."""

    def __iter__(self):
        rank = dist.get_rank() if dist.is_initialized() else 0
        yield from uneven_packs()[rank::2]

    def __len__(self):
        return 2


def uneven_packs():
    generator = torch.Generator().manual_seed(7)
    sizes = [[(16, 16), (16, 32)], [(8, 8)] * 5, [(32, 32)], [(16, 16), (8, 8), (32, 32)]]
    return [
        {
            "pixels": [torch.randint(256, (3, 1, *size), dtype=torch.uint8, generator=generator) for size in own],
            "caption": [PROMPTS[place % 3] for place in range(len(own))],
            "key": [f"{number}-{place}" for place in range(len(own))],
            "packs": [len(own)],
            "tokens": 100,
            "max_tokens": 100,
        }
        for number, own in enumerate(sizes)
    ]


class Descends(TextRefinerModule):
    """One step of it takes the gradient off the weights."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=1.0)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradients_are_those_of_all_ranks_and_accumulated_batches(tmp_path, ranks):
    build_as = functools.partial(build, sample_weight_power=0.5, gradient_clip=None)
    module, reference = build_as(), build_as()
    module.__class__, module._trainer = Descends, None
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="auto" if ranks == 1 else "ddp_fork",
        max_steps=1,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    before = copy.deepcopy(module.network.state_dict())
    trainer.fit(module, DataLoader(OfRanks(), batch_size=None))
    batches = [(uneven_packs()[2 * number + rank], number, rank) for number in range(2) for rank in range(ranks)]
    loss = step_loss(reference, batches, 0.5, step=0, ranks=ranks)
    loss.backward()
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], loss.detach(), atol=1e-5, rtol=1e-5)
    for name, parameter in reference.network.named_parameters():
        moved = before[name] - module.network.get_parameter(name)
        torch.testing.assert_close(moved, parameter.grad, atol=2e-6, rtol=1e-3, msg=name)


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
    return build(multipliers=(1, 2, 2), temporal=(True, True), frames=9, size=(16, 16), **changes)


def test_given_latents_stay_true_and_count_for_nothing():
    module, batch = build_video(context_latents=1, context_ratio=1.0), clip_pack()
    tokens = module.tokenize(batch)
    assert [tuple(sample.shape) for sample in tokens] == [(3, 3, 2, 2), (3, 1, 2, 2), (3, 2, 2, 2), (3, 3, 2, 2)]
    assert module.bundle.token_shape == (3, 3, 2, 2)
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

    module = build_video(context_latents=1, context_ratio=1.0, sample_weight_power=1)
    logged(module)
    loss = module.training_step(batch, 0)
    _, logits = module.predict_corrupted(tokens, batch["caption"], seed=0, ids=ids, step=5, context=context)
    losses = [
        F.cross_entropy(predicted[None], sample[None, :, given:])
        for predicted, sample, given in zip(logits, tokens, context)
    ]
    weights = [4 * (sample.shape[1] - given) for sample, given in zip(tokens, context)]  # of 2x2 latents
    assert weights == [8, 4, 4, 8]
    expected = sum(weight * own for weight, own in zip(weights, losses)) / sum(weights)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_clips_with_given_latents_have_a_tag_of_their_own():
    module = build_video(context_latents=1, context_ratio=1.0, prompt_prefix="<T2V>", context_prefix="<I2V>")
    logged(module)
    batch, seen, own = clip_pack() | {"caption": ["<T2V>a", "<T2I>b", "", "<T2V>c <T2V>"]}, {}, module.predict_corrupted
    module.predict_corrupted = lambda tokens, captions, **more: (
        seen.update(captions=captions) or own(tokens, captions, **more)
    )
    module.training_step(batch, 0)
    assert seen["captions"] == ["<I2V>a", "<T2I>b", "", "<I2V>c <T2V>"]

    asked = []
    module.network.encoder.register_forward_pre_hook(lambda _, texts: asked.extend(*texts))
    redraw = (torch.arange(3).view(1, 1, 3, 1, 1) > 0).expand(1, 1, 3, 2, 2)
    given = Start(torch.zeros(1, 3, 3, 2, 2, dtype=torch.long), 1.0, redraw)
    for start in (None, given):
        request = Request(prompts=("a",), negative_prompt="bad", start=start)
        module.bundle.condition(module.bundle.complete(request), torch.arange(1))
    assert asked == ["<T2V>a", "bad", "<I2V>a", "bad"]


def test_given_latents_count_into_the_realized_share():
    """Which is told of each sample, whatever the sizes beside it: the share of all its tokens that corruption kept."""
    module, batch = build_video(signal_ratio_input="realized"), clip_pack()
    tokens, ids, seen = module.tokenize(batch), torch.arange(4), {}
    module.network.forward = lambda noisy, t, text, context_frames: seen.update(t=t)
    told, _ = module.predict_corrupted(tokens, batch["caption"], seed=0, ids=ids, step=5, context=[1, 0, 1, 1])
    assert torch.equal(told, seen["t"])
    nominal = module.draw_signal_ratio(0, ids, 5)
    for row, sample in enumerate(tokens):
        draws = philox.uniform(0, philox.Stream.KEEP, ids[row : row + 1], 5, tuple(sample.shape))
        assert told[row].item() == pytest.approx((draws < nominal[row]).double().mean().item(), abs=1e-6)
    assert (told - nominal).abs().max() > 0.01


def test_a_share_of_clips_has_given_latents_and_each_number_is_as_likely():
    tokens = [torch.zeros(3, 3, 1, 1, dtype=torch.long)] * 3000
    for most, expected in ((1, [2100, 900, 0]), (2, [2100, 450, 450]), (9, [2100, 100, 800])):
        given = build_video(context_latents=most, context_ratio=0.3).draw_context(tokens, torch.arange(3000))
        assert [given.count(number) for number in range(3)] == pytest.approx(expected, abs=90)
    assert set(build_video(context_latents=0).draw_context(tokens, torch.arange(3000))) == {0}
    with pytest.raises(UserError, match=r"training\.context_ratio=1\.5 must be a number in 0 to 1"):
        build(context_ratio=1.5)
    with pytest.raises(UserError, match=r"training\.context_latents=-1 must be a whole number, at least 0"):
        build(context_latents=-1)


def test_frames_that_no_tokenizer_has_are_refused():
    module = build_video()
    module.bundle.frames = 8
    with pytest.raises(UserError, match="8 frames are not 1"):
        _ = module.bundle.token_shape


def test_streamed_clips_are_those_that_are_decoded():
    module = build_video().eval()
    tokens = torch.randint(4, (2, *module.bundle.token_shape), generator=torch.Generator().manual_seed(0))
    frames = torch.stack(list(module.bundle.decode_stream(tokens)), dim=2)
    assert frames.shape == (2, 3, 9, 16, 16)
    assert (frames.int() - module.bundle.decode(tokens).int()).abs().max() <= 1


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
    asked = (*PROMPTS, PROMPTS[1])
    whole = module.bundle.generate(Request(prompts=asked, seed=5)).tokens
    assert whole.shape == (4, 3, 1, 4, 8)
    assert module.bundle.decode(whole).shape == (4, 3, 1, 16, 32)

    def second(**changes):
        """Of one prompt and a number of another."""
        request = Request(prompts=(PROMPTS[1],), num=2, seed=5, **changes)
        ((_, refined),) = module.bundle.generate_queue(request, ids=torch.tensor([1]), batch_size=1)
        return refined.tokens

    assert torch.equal(module.bundle.generate(Request(num=2, seed=5)).tokens, whole[:2])  # its own prompts
    assert torch.equal(second(), whole[1:2])
    assert not torch.equal(second(negative_prompt="a seven"), whole[1:2])
    assert second(height=24, width=16).shape == (1, 3, 1, 6, 4)
    with pytest.raises(UserError, match="multiples of the tokenizer's stride 4"):
        second(height=24, width=18)
    assert (module.bundle.prompts[0], module.bundle.negative_prompt, module.bundle.size) == (PROMPTS[0], "", (16, 32))


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpoints_hold_what_is_trained(frozen):
    module = build(frozen)
    checkpoint = {"state_dict": module.state_dict(), "optimizer_states": [{}], "lr_schedulers": [{}]}
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
        ({"frames": "x"}, r"^training\.frames=x must be a whole number, at least 1"),
        ({"frames": 0}, r"^training\.frames=0 must be a whole number, at least 1"),
        ({"context_ratio": "a"}, r"^training\.context_ratio=a must be a number in 0 to 1"),
        ({"sample_weight_power": -0.5}, r"^training\.sample_weight_power=-0\.5 must be a number of at least 0"),
        ({"sample_weight_power": "a"}, r"^training\.sample_weight_power=a must be a number of at least 0"),
        ({"context_latents": None}, r"^training\.context_latents=None must be a whole number, at least 0"),
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
    module.network = CaptionedRefiner(TextRefiner(**SIZES, initialization="zero_head"), ByteT5(**ENCODER))
    module.network.init_weights(torch.Generator().manual_seed(0))
    logged(module)
    assert module.training_step(packs(), 0).item() == pytest.approx(math.log(4), abs=1e-5)
    stds = {name: p.std().item() for name, p in module.network.encoder.named_parameters() if p.ndim == 2}
    assert 0.8 < stds["encoder.embed_tokens.weight"] < 1.2
    assert 0.15 < stds["encoder.block.0.layer.0.SelfAttention.k.weight"] < 0.35


def run_rank(rank, folder):
    meet(rank, folder)
    with torch.device("meta"):
        sharded = CaptionedRefiner(TextRefiner(**SIZES), ByteT5(**ENCODER))
    expected = network()
    strategy().shard(sharded, expected.state_dict())
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
    whole = module.bundle.generate(Request(num=2, seed=1)).tokens
    module.network = sharded
    with torch.no_grad():
        gather_weights(sharded)
        for _ in range(rank + 1):
            assert torch.equal(module.bundle.generate(Request(num=2, seed=1)).tokens, whole)
        release_weights(sharded)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())

    # In bfloat16 the head alone stays float32: its logits are what no bf16 can hold.
    with torch.device("meta"):
        mixed = CaptionedRefiner(TextRefiner(**SIZES), ByteT5(**ENCODER))
    strategy(precision="bf16-mixed").shard(mixed, expected.state_dict())
    for method in ("predict", "text_cache"):
        register_fsdp_forward_method(mixed, method)
    dtypes = []
    mixed.refiner.head.register_forward_pre_hook(lambda head, *_: dtypes.append(head.out.weight.dtype))
    mixed.blocks[0].register_forward_pre_hook(lambda block, *_: dtypes.append(block.mlp.out.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        trained = mixed(tokens, t, PROMPTS[:2])
        sum(logits.square().mean() for logits in trained).backward()
        with torch.no_grad():
            features, lengths = expected.encoder(PROMPTS[:2])
            cache = mixed.text_cache(features, lengths)
            sampled = mixed.predict(torch.stack([tokens[0], tokens[0]]), t, cache)
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    for logits in (*trained, sampled):
        assert (logits != logits.bfloat16().float()).double().mean() > 0.9
    assert all(parameter.grad.dtype == torch.float32 for parameter in mixed.parameters())

    with torch.device("meta"):
        first = CaptionedRefiner(TextRefiner(**SIZES), ByteT5(**ENCODER))
    strategy().shard(first, seed=3)
    expected.init_weights(torch.Generator().manual_seed(3))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter.full_tensor(), names[name]), name
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_hold_the_network_of_one(tmp_path):
    commands.spawn(run_rank, (tmp_path,), nprocs=2)


def test_cut_prompts_are_told_once_each(caplog):
    module = build()
    module._trainer = None
    long = "a seven " * 8
    request = module.bundle.complete(Request(prompts=(long, "a seven"), num=4))
    for _ in range(2):
        module.bundle.condition(request, torch.arange(4))
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith('a prompt has more tokens than text_encoder.max_length=32: of "a seven a seven ')
    assert said.endswith(f'only "{long[:31]}" is drawn')  # bytes, and a token for the end


def test_a_run_tells_how_many_of_its_prompts_are_cut(caplog):
    module = build(prompts=["a seven " * 8, "a nine " * 9, "a seven"])
    module.setup("fit")
    module.bundle.condition(module.bundle.complete(Request(num=3)), torch.arange(3))
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith("2 of 3 training.prompts have more tokens than text_encoder.max_length=32")
