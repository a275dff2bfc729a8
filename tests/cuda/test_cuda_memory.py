"""Memory of training steps against what docs/cluster.md and the headers of experiments say of it."""

import gc

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from on_device import DEVICE, ON_GPU, in_bfloat16
from torch.optim.swa_utils import get_ema_multi_avg_fn

from grn.method import corruption
from grn.runtime.config_folder import CONF
from grn.training.activations import checkpoint_activations
from grn.training.optimization import adamw, clip_gradients

pytestmark = pytest.mark.cuda


def network_of(*overrides):
    """Never whole on the CPU, where filling 2 B weights takes minutes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = dict(compose("train", [*overrides, "tokenizer.ckpt=none"]).model)
    config.pop("weights")
    with torch.device("meta"):
        network = instantiate(config)
    network.to_empty(device=DEVICE)
    network.init_weights(torch.Generator(DEVICE).manual_seed(0) if ON_GPU else None)
    return network


def images(network, batch):
    shape = (batch, network.channels, 1, network.size, network.size)
    tokens = torch.randint(network.classes, shape, device=DEVICE)
    labels = torch.randint(network.num_labels, (batch,), device=DEVICE)

    def loss():
        t = torch.rand(batch, device=DEVICE)
        noisy = corruption.corrupt(tokens, t, network.classes, seed=0, ids=torch.arange(batch, device=DEVICE), step=0)
        return corruption.token_loss(network(noisy, t, labels), tokens)

    return loss


def pack(network, maps, text):
    """Pictures of so many tokens, each with a caption of `text` tokens."""
    tokens = [torch.randint(network.classes, (network.channels, 1, *shape), device=DEVICE) for shape in maps]
    features = torch.randn(text * len(maps), network.text_width, device=DEVICE, dtype=torch.bfloat16)

    def loss():
        logits = network(tokens, torch.rand(len(maps), device=DEVICE), features, [text] * len(maps))
        return corruption.per_sample(logits, tokens)[0].mean()

    return loss


def peak_of_steps(network, loss, decays):
    averages = [[p.detach().clone() for p in network.parameters()] for _ in decays]
    optimizer = adamw(network, learning_rate=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    weights = [p.detach() for p in network.parameters()]
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with in_bfloat16():
            value = loss()
        value.backward()
        clip_gradients(network.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        for decay, average in zip(decays, averages):
            get_ema_multi_avg_fn(decay)(average, weights, 1)
    assert value.isfinite()
    return torch.cuda.max_memory_allocated() if ON_GPU else 0


SMALL = ["model.depth=2", "model.width=32", "model.heads=2", "model.bottleneck=8", "model.context_start=1"]
SMALL_TEXT = ["model.depth=2", "model.width=64", "model.heads=2", "model.text_width=8"]


@pytest.mark.parametrize(
    ("size", "mode", "gigabytes"),
    [("B", "none", 29.9), ("B", "selective", 12.5), ("L", "selective", 31.7), ("L", "full", 14.0)],
)
def test_of_c2i_at_128_images_a_gpu(size, mode, gigabytes):
    network = network_of(f"+experiment=c2i_ind_{size}", *(() if ON_GPU else SMALL))
    checkpoint_activations(network, mode)
    peak = peak_of_steps(network, images(network, 128 if ON_GPU else 2), (0.9999, 0.9996))
    print(f"{size}, {mode}: {peak / 1e9:.2f} GB")
    del network
    release()
    assert peak <= 1.1e9 * gigabytes


def test_of_2B_on_a_pack_of_16384_tokens():
    """44.0 GB of states, 4.4 of copies, 4.2 of inputs of blocks, about 2 of one block: without umT5."""
    network = network_of("+experiment=finetune_t2i", *(() if ON_GPU else SMALL_TEXT))
    checkpoint_activations(network, "full")
    maps = [(64, 64)] * 3 + [(40, 50)] if ON_GPU else [(4, 6)]
    peak = peak_of_steps(network, pack(network, maps, 512 if ON_GPU else 5), (0.999,))
    print(f"2B: {peak / 1e9:.2f} GB")
    del network
    release()
    assert peak <= 1.1e9 * (44.0 + 4.4 + 4.2 + 2)


def release():
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
