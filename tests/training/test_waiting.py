"""What a GPU's steps wait for, without one: nothing, in sampling with a fixed schedule and in training from tokens.

tests/cuda/test_cuda_waiting.py asks CUDA itself.
"""

import pytest
import test_refiner_module
import test_text_refiner_module
import torch
from fake_cuda import FakeCuda
from torch._subclasses.fake_tensor import DataDependentOutputException

from grn.callbacks.ema import EMA
from grn.method.sampler import Sampler
from grn.method.schedules import EntropyGuided, Linear
from grn.sampling.request import Request
from grn.training.optimization import adamw

SAMPLERS = [
    Sampler(Linear(6), guidance=2.0, guidance_interval=(0.3, 0.9), temperature=1.1),
    Sampler(Linear(6), update="psi", kappa=0.5),
]


def module_of(kind):
    of_texts = test_text_refiner_module.build(frozen=True)
    if kind == "texts":
        return of_texts.to("cuda")
    module = test_refiner_module.build()
    module._trainer = of_texts._trainer
    return module.to("cuda")


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [
        ("classes", SAMPLERS[1]),
        *(pytest.param(kind, SAMPLERS[0], marks=pytest.mark.full) for kind in ("classes", "texts")),
    ],
)
def test_sampling_steps_never_wait(kind, sampler):
    with FakeCuda() as fake:
        module = module_of(kind).eval()
        refinement = module.bundle.refinement(Request(num=6, seed=1, sampler=sampler), batch_size=4)
        fake.waits.clear()
        steps = list(refinement)
    assert len(steps) == 12  # two samples waited for four
    assert {step.predicted.device.type for step in steps} == {"cuda"}
    assert fake.waits == []


def test_an_entropy_that_decides_is_waited_for():
    schedule = EntropyGuided(warmup=2, min_steps=4, max_steps=9)
    with FakeCuda() as fake:
        module = module_of("classes").eval()
        refinement = module.bundle.refinement(Request(num=4, seed=1, sampler=Sampler(schedule)), batch_size=4)
        fake.waits.clear()
        for _ in range(schedule.decide_at):
            next(refinement)
        assert fake.waits == []
        with pytest.raises(DataDependentOutputException):
            next(refinement)
    (operator, line), *_ = fake.waits
    assert operator == "aten._to_copy.default"
    assert line.endswith("decisive = select_rows(entropy, deciding).cpu()")


@pytest.mark.parametrize(
    ("kind", "accumulated"),
    [("classes", 1), *(pytest.param("texts", count, marks=pytest.mark.full) for count in (1, 2))],
)
def test_training_steps_never_wait(kind, accumulated):
    """The step, its backward pass, clipping, AdamW and averages, in bfloat16."""
    batch = {"pixels": test_refiner_module.pixels(), "label": torch.tensor([0, 1, 2, 3])}
    with FakeCuda() as fake:
        module = module_of(kind).train()
        if kind == "texts":
            batch = test_text_refiner_module.packs()
            batch["features"] = [
                module.frozen_encoder([caption])[0] if caption else None for caption in batch["caption"]
            ]
        batch |= {"pixels": [sample.to("cuda") for sample in batch["pixels"]]} if kind == "texts" else {
            name: value.to("cuda") for name, value in batch.items()
        }  # fmt: skip
        test_text_refiner_module.logged(module)
        optimizer = adamw(module.network, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
        average, trainer = EMA([0.9, 0.99], use=0.9), module._trainer
        trainer.accumulate_grad_batches = accumulated
        average.on_fit_start(trainer, module)
        for _ in range(2):
            fake.waits.clear()  # of the first: the state of the optimiser, the features of the empty caption
            for number in range(accumulated):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = module.training_step(batch, number)
                loss.backward()
            module.on_before_optimizer_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            trainer.global_step += 1
            average.on_train_batch_end(trainer, module)
    assert fake.waits == []
    assert all(average.device.type == "cuda" for average in average.averages["0.9"].values())


def test_what_waits_is_found():
    with FakeCuda() as fake:
        x = torch.zeros(3, device="cuda")
        assert (x + torch.ones(3).to("cuda", non_blocking=True)).shape == (3,)
        assert fake.waits == []
        for call in (x.cpu, x.tolist, x.nonzero, lambda: x[x > 0], lambda: torch.tensor([1, 2], device="cuda")):
            count = len(fake.waits)
            try:
                call()
            except Exception as error:  # torch has several for what it cannot know
                assert "fake_tensor" in type(error).__module__  # noqa: PT017
            assert len(fake.waits) > count
