"""Modules from configs: official weights of tokenizer and refiner, recorded so that a checkpoint finds them."""

import inspect

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning import Trainer
from omegaconf import OmegaConf

from grn.callbacks import EMA
from grn.checkpoints.native import Checkpoint, load_tokenizer, read_checkpoint, restore_tokenizer
from grn.cli.schema import check_settings
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.sampling.bundle import RefinerBundle
from grn.sampling.loading import bundle_from_checkpoint, save_refiner
from grn.sampling.request import Request
from grn.sampling.text_bundle import TextRefinerBundle
from grn.training.building import module_from_config


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
    again = bundle_from_checkpoint(checkpoint)
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


@pytest.fixture
def official_refiner(golden, tmp_path):
    """The golden weights as trained, their averages scaled to be told apart."""
    state = {"net." + k.removeprefix("state."): v for k, v in golden("c2i_ind").items() if k.startswith("state.")}
    averages = {f"model_ema{i}": {name: tensor * (1 + i) for name, tensor in state.items()} for i in (1, 2)}
    torch.save({"model": state, **averages, "epoch": 599}, tmp_path / "GRN_ind_B_ep599.pth")
    return tmp_path / "GRN_ind_B_ep599.pth"


SIZES = ["tokenizer.model.rounds=3", "model.classes=8", "model.depth=4", "model.context_start=2"]


def test_official_refiner_weights_start_a_run(official_tokenizer, official_refiner, golden):
    tensors = golden("c2i_ind")
    overrides = [f"model.weights={official_refiner}", *SIZES]
    module = module_from_config(config(official_tokenizer, *overrides))
    logits = module.network(tensors["tokens"].unsqueeze(2), tensors["t"], tensors["labels"])
    torch.testing.assert_close(logits.squeeze(3), tensors["logits"], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match=r"is of another size than the model.*model\.\*"):
        module_from_config(config(official_tokenizer, *overrides, "model.bottleneck=12"))
    contents = torch.load(official_refiner, weights_only=True)
    del contents["model_ema2"]["net.in_context_posemb"]
    torch.save(contents, official_refiner)
    with pytest.raises(UserError, match=r"is of another size than the model: context_position is missing"):
        module_from_config(config(official_tokenizer, *overrides))


def test_official_training_goes_on_with_its_averages(official_tokenizer, official_refiner, golden, tmp_path):
    module = module_from_config(config(official_tokenizer, f"model.weights={official_refiner}", *SIZES))
    name = "blocks.0.attention.qkv.weight"
    start = golden("c2i_ind")["state.blocks.0.attn.qkv.weight"]
    assert torch.equal(module.network.state_dict()[name], start)
    ema = EMA([0.9999, 0.9996, 0.5], use=0.9999)
    batch = {"pixels": torch.randint(256, (2, 3, 1, 128, 128), dtype=torch.uint8), "label": torch.tensor([3, 7])}
    trainer = Trainer(
        accelerator="cpu", max_steps=2, callbacks=[ema], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    history = []
    module.on_train_batch_end = lambda *_: history.append(module.network.state_dict()[name].clone())
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 2, batch_size=None))
    assert len(history) == 2
    assert not torch.equal(history[-1], start)
    for decay, factor in ((0.9999, 2), (0.9996, 3), (0.5, 1)):
        expected = start * factor
        for weights in history:
            expected = decay * expected + (1 - decay) * weights
        torch.testing.assert_close(ema.averages[str(decay)][name], expected)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = bundle_from_checkpoint(read_checkpoint(tmp_path / "last.ckpt"))
    assert torch.equal(again.network.state_dict()[name], ema.averages["0.9999"][name])


def test_a_refiner_starts_from_an_export(official_tokenizer, tmp_path):
    network = module_from_config(config(official_tokenizer)).network
    network.save_pretrained(tmp_path / "refiner")
    again = module_from_config(config(official_tokenizer, f"model.weights={tmp_path}/refiner"))
    assert all(torch.equal(tensor, again.network.state_dict()[name]) for name, tensor in network.state_dict().items())
    assert again.initial_averages == {}


@pytest.fixture
def umt5(tmp_path):
    """A tiny umT5 and its tokenizer, as transformers writes them."""
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    UMT5EncoderModel(UMT5Config(vocab_size=32, **sizes)).save_pretrained(tmp_path / "umt5")
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    T5Tokenizer([(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0).save_pretrained(
        tmp_path / "umt5"
    )
    return tmp_path / "umt5"


@pytest.mark.parametrize("encoder", ["frozen", "trained along"])
def test_a_text_refiner_and_its_encoder_come_back_from_a_checkpoint(official_tokenizer, umt5, tmp_path, encoder):
    sizes = "model.channels=16 model.depth=1 model.width=48 model.heads=4 model.mlp_ratio=6 model.text_width=16"
    sizes += " tokenizer.model.latent_channels=4 tokenizer.model.dim=8 tokenizer.model.decoder_dim=8"
    sizes += f" text_encoder=t5 text_encoder.path={umt5} text_encoder.dtype=float32"
    if encoder != "frozen":
        sizes = sizes.partition(" text_encoder")[0] + " text_encoder=byt5_tiny text_encoder.width=16"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = compose("train", ["+experiment=t2i_2B", f"tokenizer.ckpt={official_tokenizer}", *sizes.split()])
    module = module_from_config(chosen)
    torch.nn.init.normal_(module.refiner.head.out.weight, std=0.1)
    checkpoint = checkpoint_of(module, tmp_path / "x.ckpt")
    parts = {".".join(name.split(".")[:2]) for name in checkpoint.contents["state_dict"]}
    assert parts == {"network.refiner"} | ({"network.encoder"} if encoder != "frozen" else set())
    again = bundle_from_checkpoint(checkpoint)
    request = Request(num=2, height=32, width=48, sampler=Sampler(Linear(3), guidance=2.0))
    expected, found = (it.generate(request).tokens for it in (module.eval().bundle, again))
    assert torch.equal(found, expected)

    # What a strategy shards starts as the network that one process makes.
    hollow = module_from_config(chosen, hollow=True)
    assert all(parameter.is_meta for parameter in hollow.network.parameters())
    module.refiner.save_pretrained(tmp_path / "refiner")
    chosen.model.weights = str(tmp_path / "refiner")
    whole, hollow = module_from_config(chosen), module_from_config(chosen, hollow=True)
    assert torch.equal(whole.refiner.head.out.weight, module.refiner.head.out.weight)
    assert hollow.initial_weights.keys() == {f"refiner.{name}" for name in whole.refiner.state_dict()}
    assert whole.initial_weights is None
    for name, parameter in whole.refiner.named_parameters():
        assert torch.equal(hollow.initial_weights[f"refiner.{name}"], parameter)


@pytest.mark.parametrize("key", ["model.weights", "text_encoder.weights"])
def test_a_text_encoder_that_is_trained_along_starts_from_an_export(official_tokenizer, tmp_path, caplog, key):
    sizes = "model.channels=16 model.depth=1 model.width=48 model.heads=4 model.mlp_ratio=6 model.text_width=16"
    sizes += " tokenizer.model.latent_channels=4 tokenizer.model.dim=8 tokenizer.model.decoder_dim=8"
    sizes += f" text_encoder=byt5_tiny text_encoder.width=16 tokenizer.ckpt={official_tokenizer}"

    def module(*overrides, **options):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("train", ["+experiment=t2i_2B", *sizes.split(), *overrides])
        check_settings(composed)
        return module_from_config(composed, **options)

    bundle = module("seed=1").bundle
    save_refiner(bundle, tmp_path / "export")
    bundle.text_encoder.save_pretrained(tmp_path / "encoder")
    given = f"{key}={tmp_path}/export"
    started, hollow = module(given), module(given, hollow=True)
    states = [it.state_dict() for it in (bundle.text_encoder, started.text_encoder, bundle.refiner, started.refiner)]
    same = [all(torch.equal(one[name], other[name]) for name in one) for one, other in (states[:2], states[2:])]
    assert same == [True, key == "model.weights"]
    again = bundle_from_checkpoint(checkpoint_of(started, tmp_path / "x.ckpt"))
    assert all(torch.equal(again.text_encoder.state_dict()[name], tensor) for name, tensor in states[0].items())
    names = {f"encoder.{name}" for name in states[0]}
    assert names <= hollow.initial_weights.keys()
    assert all(torch.equal(hollow.initial_weights[name], states[0][name.removeprefix("encoder.")]) for name in names)
    if key == "text_encoder.weights":
        assert hollow.initial_weights.keys() == names
        other = module(f"text_encoder.weights={tmp_path}/encoder").text_encoder.state_dict()
        assert all(torch.equal(other[name], tensor) for name, tensor in states[0].items())
        with pytest.raises(UserError, match=r"text_encoder\.weights=.*: no export of a text encoder"):
            module(f"text_encoder.weights={official_tokenizer}")
        return
    with pytest.raises(UserError, match=r"was trained with model\.attention=full"):
        module(given, "model.attention=one_way")
    with caplog.at_level("WARNING", "grn.training.building"):
        module(f"{given}/refiner")
    assert "its text encoder, which is trained along, starts from nothing" in caplog.text


@pytest.mark.parametrize("kind", [RefinerBundle, TextRefinerBundle])
def test_checkpoints_give_every_setting_of_a_bundle(kind):
    others = {"network", "tokenizer", "sampler", "precision", "text_encoder"}
    assert set(kind.settings) == inspect.signature(kind).parameters.keys() - others
