"""training.loss_chunk: the same loss and gradients, without logits of the whole batch at any time."""

import pytest
import test_class_refiner
import test_refiner_module
import test_text_refiner
import test_text_refiner_module
import torch
from fake_cuda import FakeCuda
from torch.utils._python_dispatch import TorchDispatchMode

from grn.method import corruption
from grn.networks.captioned_refiner import CaptionedRefiner
from grn.runtime.errors import UserError
from grn.sampling.bundle import RefinerBundle
from grn.training import RefinerModule
from grn.training.activations import checkpoint_activations

aten = torch.ops.aten
CONTEXT = [0, 1, 0, 1]


class Logits(TorchDispatchMode):
    """Rows of 12 of the head's products and of what a cross-entropy makes of them, the most at a time."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        product = func is aten.addmm.default and result.shape[-1] == 12
        if product or func in (aten._log_softmax.default, aten._log_softmax_backward_data.default):
            self.most = max(self.most, result.numel() // 12)
        return result


def of_classes(loss_chunk, *, bf16=False, device="cpu", network=None):
    """(Mean cross-entropy, accuracy of each sample, gradients), by the logits where there are no chunks."""
    network = network or test_class_refiner.shaken().to(device)
    targets = torch.randint(4, (3, 3, 1, 4, 4), generator=torch.Generator().manual_seed(2)).to(device)
    given = [it.to(device) for it in test_class_refiner.inputs()]
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        if loss_chunk is None:
            logits = network(*given)
            losses = torch.stack([corruption.token_loss(one[None], true[None]) for one, true in zip(logits, targets)])
            accuracy = corruption.token_accuracy(logits, targets)
        else:
            losses, accuracy = network(*given, targets=targets, loss_chunk=loss_chunk)
    losses.mean().backward()
    return losses.detach(), accuracy, {name: p.grad for name, p in network.named_parameters()}


def of_texts(loss_chunk, *, bf16=False, device="cpu", scheme="one_way"):
    network = CaptionedRefiner(test_text_refiner.shaken(attention=scheme).to(device))
    tokens, t, text, lengths = test_text_refiner.samples()
    tokens, t, text = [it.to(device) for it in tokens], t.to(device), text.to(device)
    targets = [(3 - sample)[:, given:] for sample, given in zip(tokens, CONTEXT)]
    told = {} if loss_chunk is None else {"targets": targets, "loss_chunk": loss_chunk}
    context = [min(given, sample.shape[1] - 1) for given, sample in zip(CONTEXT, tokens)]
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        made = network(tokens, t, (text, lengths), context_frames=context, **told)
    losses, accuracy = made if told else corruption.per_sample(made, targets)
    losses.mean().backward()
    return losses.detach(), accuracy, {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("loss_chunk", [1, 33, 10**6])  # of 3 * 16 positions, and of 48
@pytest.mark.parametrize("run", [of_classes, of_texts])
def test_loss_accuracy_and_gradients_are_those_of_all_logits(run, loss_chunk, bf16):
    losses, accuracy, gradients = run(loss_chunk, bf16=bf16)
    expected = run(None, bf16=bf16)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(accuracy, expected[1])
    assert 0 < accuracy.max() < 1
    for name, gradient in expected[2].items():
        # Gradients of bf16 layers are rounded to bf16 where the head's differ in their last bit.
        bounds = {"rtol": 1e-2, "atol": 1e-4} if bf16 and "head" not in name else {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(gradients[name], gradient, **bounds, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("run", [of_classes, of_texts])
def test_there_are_never_logits_of_all(run):
    with Logits() as whole:
        run(None)
    with Logits() as chunked:
        run(16)
    assert whole.most >= 48
    assert chunked.most == 16


def test_beside_checkpointed_blocks_and_in_one_graph():
    expected, shallow = of_classes(None)[2], of_classes(None, network=test_class_refiner.shaken(depth=2))[2]
    network = test_class_refiner.shaken()
    checkpoint_activations(network, "selective")
    again = of_classes(16, network=network)[2]
    compiled = test_class_refiner.shaken(depth=2)
    compiled.compile(backend="aot_eager", fullgraph=True)
    for found, right in ((again, expected), (of_classes(16, network=compiled)[2], shallow)):
        for name, gradient in right.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("run", [of_classes, of_texts])
def test_the_host_waits_for_nothing_on_cuda(run):
    with FakeCuda() as fake:
        run(16, device="cuda", bf16=True)
    assert [wait for wait in fake.waits if wait[1] != "outside of grn"] == []  # in which inputs are sent there


def test_a_step_of_training_logs_the_same():
    found = {}
    for loss_chunk in (None, 20):
        module = test_refiner_module.build(training={"loss_chunk": loss_chunk})
        torch.nn.init.normal_(module.network.head.out.weight, generator=torch.Generator().manual_seed(1))
        module._trainer = test_text_refiner_module.build()._trainer
        logs = test_text_refiner_module.logged(module)
        batch = {"pixels": test_refiner_module.pixels(), "label": torch.tensor([0, 1, 2, 3])}
        module.training_step(batch, 0).backward()
        found[loss_chunk] = logs["train/loss"].detach(), *module._accuracy, module.network.head.out.weight.grad
    for one, other in zip(found[20], found[None]):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_of_packs_has_the_same_gradients(frozen):
    found = {}
    for loss_chunk in (None, 20):
        module = test_text_refiner_module.build(frozen, loss_chunk=loss_chunk, sample_weight_power=0.5).train()
        test_text_refiner_module.logged(module)
        module.training_step(test_text_refiner_module.packs(), 0).backward()
        found[loss_chunk] = [*module._accuracy, *(p.grad for p in module.network.parameters())]
    for one, other in zip(found[20], found[None], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_chunk", [0, 1.5, True, "all"])
def test_mistakes_name_the_key(loss_chunk):
    with pytest.raises(UserError, match=r"training\.loss_chunk"):
        test_refiner_module.build(training={"loss_chunk": loss_chunk})


def test_a_network_without_is_refused():
    module = test_refiner_module.build()
    bare = torch.nn.Linear(1, 1)
    bare.channels, bare.classes, bare.num_labels = module.network.channels, module.network.classes, 5
    with pytest.raises(UserError, match=r"training\.loss_chunk=16: Linear has no loss in chunks; training.loss_chunk"):
        RefinerModule(RefinerBundle(bare, module.tokenizer, module.bundle.sampler), loss_chunk=16)
