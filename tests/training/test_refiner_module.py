from types import SimpleNamespace

import pytest
import torch

from grn.errors import UserError
from grn.networks.class_refiner import ClassRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.sampler import Linear, Sampler
from grn.training import RefinerModule


def build(labeling="ind", **changes):
    torch.manual_seed(0)
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 2), blocks_per_stage=1, temporal=(False,)
    )
    sizes = {"channels": 3, "classes": 4} if labeling == "ind" else {"channels": 6, "classes": 2}
    network = ClassRefiner(
        **sizes | changes, num_labels=5, size=4, depth=2, width=16, heads=2, bottleneck=8, context_start=1,
        context_tokens=2,
    )  # fmt: skip
    return RefinerModule(network, tokenizer, Sampler(Linear(4)), labeling=labeling)


def pixels():
    return torch.randint(256, (4, 3, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("labeling", ["ind", "bit"])
def test_tokens_of_both_labelings_carry_the_same_image(labeling):
    module = build(labeling)
    tokens = module.tokenize({"pixels": pixels()})
    assert tokens.shape == (4, *module.token_shape)
    assert tokens.max() < module.network.classes
    reconstructed = module.tokenizer(pixels().float() / 127.5 - 1)[0]
    expected = ((reconstructed.clamp(-1, 1) + 1) * 127.5).round()
    assert (module.decode(tokens).float() - expected).abs().max() <= 1


def test_the_tokenizer_stays_frozen_and_in_evaluation_mode():
    module = build().train()
    assert module.network.training
    assert not module.tokenizer.training
    assert not any(p.requires_grad for p in module.tokenizer.parameters())


@pytest.mark.parametrize("labeling", ["ind", "bit"])
def test_generation_is_a_function_of_seed_and_id(labeling):
    module = build(labeling).eval()
    labels, ids = torch.tensor([0, 1, 2, 3]), torch.arange(4)
    whole = module.generate(labels, seed=5, ids=ids).tokens
    assert torch.equal(module.generate(labels[2:], seed=5, ids=ids[2:]).tokens, whole[2:])
    assert module.decode(whole).shape == (4, 3, 1, 16, 16)


def test_misfit_with_the_tokenizer_names_the_keys():
    with pytest.raises(UserError, match=r"model\.channels=4 .* needs model\.channels=3 model\.classes=4"):
        build(channels=4)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_position_of_a_step_is_drawn_for_once(ranks):
    """And rank after rank has those of its samples (`grn.data.endless`)."""
    module = build()
    for batch_idx in range(3, 6):
        of_ranks = []
        for rank in range(ranks):
            module._trainer = SimpleNamespace(world_size=ranks, global_rank=rank, accumulate_grad_batches=3)
            of_ranks.append(module._positions(batch_idx, 8 // ranks))
        first = (batch_idx - 3) * 8
        assert torch.stack(of_ranks, dim=1).flatten().tolist() == list(range(first, first + 8))


def test_checkpoint_leaves_the_tokenizer_out_and_puts_it_back():
    module = build()
    module.checkpoint_extras = {"config": {"a": 1}}
    checkpoint = {"state_dict": module.state_dict()}
    whole = set(checkpoint["state_dict"])
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["config"] == {"a": 1}
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"network"}
    module.on_load_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == whole
