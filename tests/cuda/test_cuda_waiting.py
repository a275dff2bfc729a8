"""No step of sampling or of training has the host wait for the GPU, except where an entropy decides."""

import pytest
import test_refiner_module
import test_text_refiner_module
import torch
from on_device import DEVICE, in_bfloat16, never_waiting, on

from grn.callbacks.ema import EMA
from grn.method.sampler import Sampler
from grn.method.schedules import EntropyGuided, Linear
from grn.sampling.request import Request
from grn.training.optimization import adamw, clip_gradients

pytestmark = pytest.mark.cuda

PLAIN = Sampler(Linear(6), guidance=2.0, guidance_interval=(0.3, 0.9), temperature=1.1)
PSI = Sampler(Linear(6), update="psi", kappa=0.5)


def module_of(kind):
    module = test_refiner_module.build() if kind == "classes" else test_text_refiner_module.build(frozen=True)
    module.network.requires_grad_(True)
    if kind == "classes":
        module._trainer = test_text_refiner_module.build()._trainer
    return module.to(DEVICE)


@pytest.mark.parametrize("sampler", [PLAIN, PSI], ids=lambda it: it.update)
@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_sampling_steps_never_wait(kind, sampler):
    module = module_of(kind).eval()
    request = Request(num=6, seed=1, sampler=sampler)
    refinement = module.bundle.refinement(request, batch_size=4)
    next(refinement)
    with never_waiting():
        steps = sum(1 for _ in refinement)
    assert steps == 11  # two samples waited for the first four
    _, refined = refinement.take(6)
    assert refined.steps.tolist() == [6] * 6


def test_entropy_guided_sampling_waits_where_it_decides_alone():
    module = module_of("classes").eval()
    schedule = EntropyGuided(warmup=2, scale=50.0, offset=-45.0, min_steps=4, max_steps=9)
    refinement = module.bundle.refinement(Request(num=4, seed=1, sampler=Sampler(schedule)), batch_size=4)
    for number in range(4):
        if number == schedule.decide_at:
            next(refinement)
        else:
            with never_waiting():
                next(refinement)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_training_steps_never_wait(kind, compiled):
    """From tokens: the step, its backward pass, clipping, AdamW and averages."""
    module = module_of(kind).train()
    if compiled and kind == "classes":
        module.network.compile()
    logs = test_text_refiner_module.logged(module)
    batch = {"pixels": test_refiner_module.pixels(), "label": torch.tensor([0, 1, 2, 3])}
    if kind == "texts":
        batch = test_text_refiner_module.packs()
        encoder = module.frozen_encoder
        batch["features"] = [encoder([caption])[0] if caption else None for caption in batch["caption"]]
    batch = on(DEVICE, batch)
    optimizer = adamw(module.network, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    averages, trainer = [EMA([0.9, 0.99], use=0.9, side_stream=aside) for aside in (False, True)], module._trainer
    for average in averages:
        average.on_fit_start(trainer, module)

    def step():
        with in_bfloat16():
            loss = module.training_step(batch, 0)
        loss.backward()
        for average in averages:
            average.on_before_optimizer_step(trainer, module, optimizer)
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        trainer.global_step += 1
        for average in averages:
            average.on_train_batch_end(trainer, module)

    step()  # fills the optimiser's state, and compiles
    with never_waiting():
        step()
        clip_gradients(module.network.parameters(), 1.0)
    assert {"train/grad_norm", "train/loss"} <= logs.keys()
    for _ in range(20):  # what a race would show
        step()
    for average in averages:
        average.on_train_end(trainer, module)
    for decay in ("0.9", "0.99"):
        for one, other in zip(*(average.averages[decay].values() for average in averages)):
            assert torch.equal(one, other)
