"""Low-rank adapters: what is trained, what a run samples with, a file of them, and what does not fit."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import TEXTS, composed, write_run

from grn.checkpoints.native import read_checkpoint
from grn.networks.adapters import adapter_state
from grn.runtime.errors import UserError
from grn.runtime.failures import MISTAKES, explain
from grn.sampling.loading import load_refiner
from grn.sampling.pipeline import GRNPipeline
from grn.training.building import module_from_config
from grn.training.export import export
from grn.training.train import train

ADAPTERS = "training.adapters={rank:2,alpha:3}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("adapters"), f"{TEXTS} {ADAPTERS}")


def training_module(run, *overrides):
    return module_from_config(composed("train", *TEXTS.split(), f"tokenizer.ckpt={run}/tokenizer", *overrides))


@torch.no_grad()
def logits(module):
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(4, (3, 1, 2, 4), generator=generator)]
    return module.eval().network(tokens, torch.tensor([0.4]), ["a seven"])[0]


def test_adapters_alone_are_trained_and_change_nothing_at_first(run):
    plain, adapted = training_module(run), training_module(run, ADAPTERS)
    assert torch.equal(logits(plain), logits(adapted))
    trained = {name for name, parameter in adapted.network.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 7  # blocks, matrices, layers
    assert all(".lora_" in name and name.startswith("refiner.blocks.") for name in trained)
    again = training_module(run, ADAPTERS)
    assert all(map(torch.equal, adapted.network.state_dict().values(), again.network.state_dict().values()))


def test_a_run_samples_with_its_adapters_merged(run):
    adapted = training_module(run, ADAPTERS)
    state = read_checkpoint(run).weights("none")
    adapted.network.load_state_dict(state)
    merged, _ = load_refiner(str(run))
    assert not any("lora" in name for name in merged.network.state_dict())
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=1e-4)
    plain = training_module(run)
    plain.network.load_state_dict(
        {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if "lora" not in name}
    )
    assert (logits(merged) - logits(plain)).abs().max() > 0.01


def test_a_file_of_adapters_is_merged_into_other_weights(run, tmp_path):
    path = export(composed("export", f"ckpt={run}", f"out={tmp_path}/style", "format=adapters"))
    assert path == tmp_path / "style.safetensors"
    tensors = load_file(path)
    assert tensors.keys() == adapter_state(read_checkpoint(run).weights("none")).keys()
    pipe = GRNPipeline.from_pretrained(run)
    before = {name: tensor.clone() for name, tensor in pipe.bundle.refiner.state_dict().items()}
    assert pipe.load_lora_weights(path, scale=-1) is pipe  # the run's own, out again
    base = read_checkpoint(run).weights("none")
    name = "blocks.1.attention.v"
    torch.testing.assert_close(
        pipe.bundle.refiner.state_dict()[f"{name}.weight"], base[f"refiner.{name}.base_layer.weight"]
    )
    pipe.load_lora_weights(path)
    for name, tensor in pipe.bundle.refiner.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


GOOD = {"blocks.0.mlp.out.lora_A": torch.ones(2, 512), "blocks.0.mlp.out.lora_B": torch.ones(24, 2)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({}, {"rank": "2", "alpha": "3"}, "holds no adapters of a text refiner"),
        (GOOD, {"rank": "0", "alpha": "3"}, r"is no file of adapters \(ZeroDivisionError\)"),
        (GOOD, {"rank": "2"}, r"is no file of adapters \(KeyError\)"),
        (GOOD, {"rank": "2", "alpha": "nan"}, "is no file of adapters"),
        (GOOD, {"rank": "2", "alpha": "3"}, "the adapter of blocks.0.mlp.out does not fit this refiner"),
        (
            {"head.out.lora_A": torch.ones(2, 24), "head.out.lora_B": torch.ones(12, 2)},
            {"rank": "2", "alpha": "3"},
            "fit",
        ),
        ({"blocks.0.mlp.out.lora_A": torch.ones(2, 24)}, {"rank": "2", "alpha": "3"}, "holds no adapters"),
        (
            {"blocks.0.attention.q.lora_A": torch.ones(2, 24) / 0, "blocks.0.attention.q.lora_B": torch.ones(24, 2)},
            {"rank": "2", "alpha": "3"},
            "is not finite",
        ),
    ],
)
def test_hostile_files(run, tmp_path, tensors, metadata, said):
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=said) as error:
        GRNPipeline.from_pretrained(run).load_lora_weights(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_mistakes(run, tmp_path):
    def said(call):
        with pytest.raises(MISTAKES) as error:
            call()
        return explain(error.value)

    pipe = GRNPipeline.from_pretrained(run)
    assert "no such file" in said(lambda: pipe.load_lora_weights(tmp_path / "gone.safetensors"))
    (tmp_path / "text").write_text("x")
    assert "is no file of adapters" in said(lambda: pipe.load_lora_weights(tmp_path / "text"))
    assert "training.adapters.rank=0" in said(lambda: training_module(run, "training.adapters={rank:0,alpha:3}"))
    assert "training.adapters.alpha=-1" in said(lambda: training_module(run, "training.adapters={rank:2,alpha:-1}"))
    for odd in ("3", "{rank:2}", "{rank:2,alpha:2,dropout:1}"):
        assert "must be {rank:16,alpha:16}" in said(lambda odd=odd: training_module(run, f"training.adapters={odd}"))
    arguments = [f"ckpt={run}/tokenizer", f"out={tmp_path}/x", "format=adapters"]
    assert "tokenizer is a tokenizer" in said(lambda: export(composed("export", *arguments)))
    plain = write_run(tmp_path, TEXTS)
    arguments = [f"ckpt={plain}", f"out={tmp_path}/x", "format=adapters"]
    assert "was trained without (training.adapters)" in said(lambda: export(composed("export", *arguments)))


def test_training_asks_for_the_weights_that_adapters_go_on(run):
    with pytest.raises(UserError, match=r"^training\.adapters go on top of .*: give model\.weights"):
        train(composed("train", *TEXTS.split(), ADAPTERS, f"tokenizer.ckpt={run}/tokenizer"))
