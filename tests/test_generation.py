import torch

from grn.generation import equal_labels, generate
from grn.networks.class_refiner import ClassRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.sampler import Linear, Sampler
from grn.training import RefinerModule


def test_labels_take_turns():
    assert equal_labels(7, [3, 5, 9]).tolist() == [3, 5, 9, 3, 5, 9, 3]


def test_images_do_not_depend_on_batches_or_ranks():
    torch.manual_seed(0)
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 2), blocks_per_stage=1, temporal=(False,)
    )
    network = ClassRefiner(
        channels=3, classes=4, num_labels=5, size=4, depth=1, width=16, heads=2, bottleneck=8, context_start=0
    )
    module = RefinerModule(network, tokenizer, Sampler(Linear(3))).eval()
    labels = equal_labels(7, range(5))
    (whole,) = generate(module, labels, batch_size=7, seed=2)
    assert whole.images.shape == (7, 3, 16, 16)
    assert whole.images.dtype == torch.uint8
    for ranks in (1, 2):
        tokens = torch.empty_like(whole.refined.tokens)
        for rank in range(ranks):
            for batch in generate(module, labels, batch_size=2, seed=2, rank=rank, world_size=ranks):
                tokens[batch.ids] = batch.refined.tokens
                assert torch.equal(batch.labels, labels[batch.ids])
        assert torch.equal(tokens, whole.refined.tokens)
