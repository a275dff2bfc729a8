"""Trains the small networks of judges, the same wherever it is asked for."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def fitted(
    begin: Callable[[], tuple[nn.Module, Callable[[Tensor], Tensor]]],
    number: int,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> dict[str, Tensor]:
    """The weights of a network after AdamW with one cycle of the learning rate, on the CPU in float32.

    It may be called in no_grad, inference mode or autocast, and leaves the global random state as it was.

    Args:
        begin: makes the network and its loss, a scalar of the samples whose numbers, int64 [B], it gets. Validation
            loops run in inference mode, whose tensors autograd refuses: it clones what the loss takes.
        number: of samples.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
    ):
        torch.manual_seed(seed)
        network, loss = begin()
        optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
        steps = epochs * -(-number // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
        for _ in range(epochs):
            for index in torch.randperm(number).split(batch_size):
                optimizer.zero_grad()
                loss(index).backward()
                optimizer.step()
                schedule.step()
        return {name: value.detach() for name, value in network.state_dict().items()}
