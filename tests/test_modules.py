"""Modules from configs: official weights of tokenizer and refiner, recorded so that a checkpoint finds them."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from grn.checkpoints.native import Checkpoint, load_tokenizer, restore_tokenizer
from grn.cli import CONF
from grn.errors import UserError
from grn.modules import module_from_checkpoint, module_from_config


@pytest.fixture
def official_tokenizer(golden, tmp_path):
    state = {k.removeprefix("state."): v for k, v in golden("tokenizer").items() if k.startswith("state.")}
    path = tmp_path / "HBQ_image_tokenizer_16dim_M4.ckpt"
    torch.save({"ema": state, "vae": {name: tensor * 0 for name, tensor in state.items()}}, path)
    return path


def config(official_tokenizer, *overrides):
    sizes = "tokenizer.model.latent_channels=4 tokenizer.model.dim=8 tokenizer.model.decoder_dim=8"
    sizes += " model.channels=4 model.size=8 model.depth=2 model.width=48 model.heads=4 model.bottleneck=16"
    sizes += " model.context_start=1 model.context_tokens=4 model.num_labels=10"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(
            "train", ["+experiment=c2i_ind_B", f"tokenizer.ckpt={official_tokenizer}", *sizes.split(), *overrides]
        )


def checkpoint_of(module, path):
    contents = {"state_dict": module.state_dict(), "global_step": 0}
    module.on_save_checkpoint(contents)
    return Checkpoint(path, OmegaConf.create(contents["config"]), contents)


def test_official_tokenizer_is_recorded_by_path_and_hash(official_tokenizer, golden, tmp_path):
    module = module_from_config(config(official_tokenizer))
    expected = golden("tokenizer")
    features = module.tokenizer.encode(expected["T1.video"])
    torch.testing.assert_close(features, expected["T1.features"], atol=1e-4, rtol=0)
    checkpoint = checkpoint_of(module, tmp_path / "x.ckpt")
    record = checkpoint.contents["tokenizer"]
    assert record["state_dict"] is None  # 700 M parameters do not belong into every checkpoint
    again = module_from_checkpoint(checkpoint)
    torch.testing.assert_close(again.tokenizer.encode(expected["T1.video"]), features, atol=0, rtol=0)
    assert (again.sampler.temperature, again.sampler.guidance) == (1.31, 2.35)


def test_a_changed_or_lost_tokenizer_is_noticed(official_tokenizer):
    model = config(official_tokenizer).tokenizer.model
    _, record = load_tokenizer(official_tokenizer, embed=False, official=model)
    contents = torch.load(official_tokenizer, weights_only=True)
    contents["ema"]["conv2.bias"] += 1
    torch.save(contents, official_tokenizer)
    with pytest.raises(UserError, match="its weights changed"):
        restore_tokenizer(record)
    official_tokenizer.unlink()
    with pytest.raises(UserError, match="HBQ_image_tokenizer_16dim_M4"):
        restore_tokenizer(record)


def test_a_tokenizer_starts_from_the_authors_weights_or_from_an_export(official_tokenizer, golden, tmp_path):
    tensors = golden("tokenizer")
    sizes = "model.latent_channels=4 model.dim=8 model.decoder_dim=8 training.perceptual_weight=0 training.gan_weight=0"
    for weights in (official_tokenizer, tmp_path / "export"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("train", ["+experiment=tokenizer_image", f"model.weights={weights}", *sizes.split()])
        network = module_from_config(composed).network
        torch.testing.assert_close(network.encode(tensors["T5.video"]), tensors["T5.features"], atol=1e-4, rtol=0)
        network.save_pretrained(tmp_path / "export")


def test_official_refiner_weights_start_a_run(official_tokenizer, golden, tmp_path):
    tensors = golden("c2i_ind")
    state = {"net." + k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    path = tmp_path / "GRN_ind_B_ep599.pth"
    torch.save({"model": state, "model_ema1": state, "model_ema2": state, "epoch": 599}, path)
    overrides = [f"model.weights={path}", "model.classes=8", "model.depth=4", "model.context_start=2"]
    module = module_from_config(config(official_tokenizer, "tokenizer.model.rounds=3", *overrides))
    logits = module.network(tensors["tokens"].unsqueeze(2), tensors["t"], tensors["labels"])
    torch.testing.assert_close(logits.squeeze(3), tensors["logits"], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match=r"is of another size than the model.*model\.\*"):
        module_from_config(config(official_tokenizer, *overrides, "tokenizer.model.rounds=3", "model.bottleneck=12"))
