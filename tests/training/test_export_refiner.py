"""python -m grn.export of refiners: one folder that samples as the checkpoint does; the authors' files both ways."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from grn.checkpoints.exported import FILES, load_exported_refiner
from grn.checkpoints.native import weights_hash
from grn.checkpoints.official_class_refiner import load_official_class_refiner
from grn.method.schedules import Linear
from grn.networks.class_refiner import ClassRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.sampling.loading import load_refiner
from grn.sampling.request import Request
from grn.sampling.sample import sample
from grn.training.building import module_from_config
from grn.training.export import export
from grn.weights.kinds import INDEX

REFINER = "model.channels=4 model.classes=8 model.num_labels=10 model.size=8 model.depth=4 model.width=48 model.heads=4"
REFINER += " model.bottleneck=16 model.context_start=2 model.context_tokens=4 model.mlp_ratio=4.0"
TOKENIZER = {
    "latent_channels": 4,
    "rounds": 3,
    "dim": 4,
    "decoder_dim": 4,
    "multipliers": [1, 1],
    "temporal": [True],
    "blocks_per_stage": 1,
}


def composed(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, [str(override) for override in overrides])


def exported(*overrides):
    return export(composed("export", *overrides))


@pytest.fixture
def tokenizer(tmp_path):
    torch.manual_seed(0)
    return HBQTokenizer(**TOKENIZER).save_pretrained(tmp_path / "tokenizer", provenance={"step": 5})


@pytest.fixture
def official(golden, tmp_path):
    """The golden weights as the authors' file would hold them: as trained, and two averages that can be told apart."""
    state = {"net." + k.removeprefix("state."): v for k, v in golden("c2i_ind").items() if k.startswith("state.")}
    averages = {f"model_ema{i}": {name: tensor * (1 + i / 8) for name, tensor in state.items()} for i in (1, 2)}
    torch.save({"model": state, **averages, "optimizer": {}, "epoch": 599}, tmp_path / "GRN_ind_B_ep599.pth")
    return tmp_path / "GRN_ind_B_ep599.pth"


@pytest.fixture
def run(tokenizer, official, tmp_path):
    """A run folder as a refiner's training from the official file leaves it."""
    module = module_from_config(
        composed(
            "train", "+experiment=digits_c2i", f"tokenizer.ckpt={tokenizer}", f"model.weights={official}",
            "sampler.schedule.min_steps=4", "sampler.schedule.max_steps=6", *REFINER.split(),
        )
    )  # fmt: skip
    contents = {"state_dict": module.state_dict(), "global_step": 12}
    contents |= {"ema": module.initial_averages, "ema_use": "0.9999"}
    module.on_save_checkpoint(contents)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save(contents, tmp_path / "run" / "checkpoints" / "last.ckpt")
    return tmp_path / "run"


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout(run, tokenizer, official, tmp_path):
    folder = exported(f"ckpt={run}")
    assert folder == run / "export"
    assert set(files(folder)) == set(FILES)
    index = json.loads((folder / INDEX).read_text())
    assert {name: value for name, value in index.items() if name != "_grn_version"} == {
        "_class_name": "GRNPipeline",
        "_format": 1,
        "refiner": ["grn", "ClassRefiner"],
        "tokenizer": ["grn", "HBQTokenizer"],
        "labeling": "ind",
        "sampler": {
            "schedule": {
                "_class_name": "EntropyGuided", "warmup": 3, "scale": 100.0, "offset": -50.0, "min_steps": 4,
                "max_steps": 6, "grid": "linear", "alpha": 1.0, "cap": 0.999,
            },
            "temperature": 1.0,
            "guidance": 1.5,
            "guidance_interval": [0.2, 1.0],
            "update": "redraw", "kappa": 1.0, "kappa_form": "constant", "kappa_window": [0.0, 1.0],
        },
    }  # fmt: skip
    state = load_file(folder / "refiner" / "model.safetensors")
    averaged = load_official_class_refiner(official)["ema"]["0.9999"]
    assert weights_hash(state) == weights_hash(averaged)
    of_refiner, of_tokenizer = (
        json.loads((folder / part / "config.json").read_text())["_provenance"] for part in ("refiner", "tokenizer")
    )
    assert of_refiner == {
        "source": str(run / "checkpoints" / "last.ckpt"),
        "step": 12,
        "ema": "0.9999",
        "sha256": weights_hash(averaged),
    }
    assert (of_tokenizer["source"], of_tokenizer["step"]) == (str(tokenizer), 5)
    assert (folder / "tokenizer" / "model.safetensors").read_bytes() == (tokenizer / "model.safetensors").read_bytes()
    assert files(exported(f"ckpt={run}", f"out={tmp_path}/second")) == files(folder)
    assert ClassRefiner.from_pretrained(folder, subfolder="refiner").size == 8


def test_it_samples_what_the_checkpoint_samples(run):
    folder = exported(f"ckpt={run}")
    (first, source), (second, again) = load_refiner(str(run)), load_refiner(str(folder))
    assert (again["ckpt"], again["step"]) == (str(folder), source["step"])
    assert (second.sampler, second.network.training, second.labeling) == (first.sampler, False, "ind")
    tokens = [module.generate(Request(num=4, seed=3)).tokens for module in (first, second)]
    assert torch.equal(*tokens)
    assert torch.equal(first.decode(tokens[0]), second.decode(tokens[1]))
    for overrides in ([], ["sampler=linear", "sampler.schedule.steps=3", "sampler.guidance=1"]):
        outs = [
            sample(composed("sample", f"ckpt={ckpt}", "num=3", "device=cpu", f"out={ckpt}_samples", *overrides))
            for ckpt in (run, folder)
        ]
        assert files(outs[0])["samples.png"] == files(outs[1])["samples.png"]
        assert files(outs[0])["refinement.gif"] == files(outs[1])["refinement.gif"]
        reports = [json.loads((out / "samples.json").read_text()) for out in outs]
        assert [report["step"] for report in reports] == [12, 12]
        for key in ("sampler", "labels", "steps", "entropy", "entropy_at_decision"):
            assert reports[0][key] == reports[1][key], key


def test_results_stay_out_of_the_folder(run):
    folder = exported(f"ckpt={run}")
    assert composed("sample", f"ckpt={folder}").out == f"{folder}_results/samples"


def test_which_average_and_which_sampler(run, official):
    loaded = load_official_class_refiner(official)
    for ema, state in (("none", loaded["model"]), ("0.9996", loaded["ema"]["0.9996"])):
        folder = exported(
            f"ckpt={run}", f"ema={ema}", "sampler=linear", "sampler.schedule.steps=7", "sampler.temperature=2"
        )
        found = load_exported_refiner(folder)
        assert weights_hash(found.refiner.state_dict()) == weights_hash(state)
        assert (found.sampler.schedule, found.sampler.temperature, found.sampler.guidance) == (Linear(7), 2.0, 1.5)
    with pytest.raises(UserError, match=r"ema=0\.9996: .*export holds one set of weights; leave ema out"):
        load_refiner(str(folder), ema=0.9996)


def test_an_official_file_becomes_a_folder(official, tokenizer, golden, run):
    arguments = [f"ckpt={official}", "model=class_refiner_B", f"tokenizer.ckpt={tokenizer}", *REFINER.split()]
    sampler = ["sampler=linear", "sampler.temperature=1.31", "sampler.guidance=2.35"]
    tensors = golden("c2i_ind")
    folder = exported(*arguments, *sampler, "ema=none")
    assert folder == official.parent / "export"
    module, source = load_refiner(str(folder))
    assert source == {"ckpt": str(folder), "step": None}
    assert (module.labeling, module.sampler.temperature, module.sampler.guidance) == ("ind", 1.31, 2.35)
    logits = module.network(tensors["tokens"].unsqueeze(2), tensors["t"], tensors["labels"])
    torch.testing.assert_close(logits.squeeze(3), tensors["logits"], atol=1e-4, rtol=0)
    averaged = exported(*arguments)
    provenance = json.loads((averaged / "refiner" / "config.json").read_text())["_provenance"]
    assert (provenance["source"], provenance["ema"]) == (str(official), "0.9999")
    of_run = exported(f"ckpt={run}")
    for part in ("refiner", "tokenizer"):
        name = f"{part}/model.safetensors"
        assert files(averaged)[name] == files(of_run)[name]


def test_the_labeling_is_the_one_that_fits(golden, tokenizer, tmp_path):
    state = {"net." + k.removeprefix("state."): v for k, v in golden("c2i_bit").items() if k.startswith("state.")}
    torch.save({"model": state, "model_ema1": state, "model_ema2": state}, tmp_path / "GRN_bit.pth")
    arguments = [f"ckpt={tmp_path}/GRN_bit.pth", "model=class_refiner", f"tokenizer.ckpt={tokenizer}", *REFINER.split()]
    folder = exported(*arguments, "model.channels=12", "model.classes=2")
    assert load_exported_refiner(folder).labeling == "bit"
    with pytest.raises(UserError, match=r"model\.channels=6 model\.classes=4 do not fit a tokenizer of 4 channels"):
        exported(*arguments, "model.channels=6", "model.classes=4", f"out={tmp_path}/odd")


def test_official_format(run, official, tmp_path):
    """Of a run that kept both of the authors' decays, their file again."""
    file = exported(f"ckpt={run}", "format=official", f"out={tmp_path}/v1.5/ours")
    assert file == tmp_path / "v1.5" / "ours.pth"
    before, after = load_official_class_refiner(official), load_official_class_refiner(file)
    for state, again in ((before["model"], after["model"]), *zip(before["ema"].values(), after["ema"].values())):
        assert weights_hash(state) == weights_hash(again)
    path = run / "checkpoints" / "last.ckpt"
    contents = torch.load(path, weights_only=True)
    contents["ema"] = {"0.99": contents["ema"]["0.9996"]}
    torch.save(contents | {"ema_use": "0.99"}, path)
    other = load_official_class_refiner(exported(f"ckpt={run}", "format=official"))
    assert weights_hash(other["model"]) == weights_hash(before["model"])
    for average in other["ema"].values():
        assert weights_hash(average) == weights_hash(before["ema"]["0.9996"])


def test_mistakes(run, official, tokenizer, tmp_path):
    def complaint(*overrides):
        with pytest.raises(UserError) as error:
            exported(*overrides)
        assert "\n" not in str(error.value)
        return str(error.value)

    theirs = [f"ckpt={official}", "model=class_refiner", *REFINER.split(), f"out={tmp_path}/out"]
    assert "tokenizer.ckpt: the authors' refiners do not hold their tokenizer" in complaint(*theirs)
    theirs.append(f"tokenizer.ckpt={tokenizer}")
    assert "is of another size than the model" in complaint(*theirs, "model.depth=3")
    assert "format=official: ckpt is one of the authors' files already" in complaint(*theirs, "format=official")
    assert "ema=0.5 is not in " in complaint(*theirs, "ema=0.5")
    assert "ckpt: no file nothing.pth" in complaint(*theirs, "ckpt=nothing.pth")
    assert "knows its tokenizer; leave it out" in complaint(f"ckpt={run}", f"tokenizer.ckpt={tokenizer}")
    assert "ema=0.5 is not in " in complaint(f"ckpt={run}", "ema=0.5")
    assert "model=class_refiner_B tokenizer=official_image" in complaint(f"ckpt={official}")
    with pytest.raises(UserError, match="model=class_refiner_B tokenizer=official_image"):
        load_refiner(str(official))
    folder = exported(f"ckpt={run}")
    assert "is an export already" in complaint(f"ckpt={folder}")
    assert "holds other files (config.json)" in complaint(f"ckpt={run}", f"out={tokenizer}")
    with pytest.raises(UserError, match="holds other files"):
        HBQTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    (folder / "tokenizer" / "notes.txt").write_text("mine")
    assert "tokenizer holds other files (notes.txt)" in complaint(f"ckpt={run}")
    assert (folder / "tokenizer" / "notes.txt").read_text() == "mine"


def test_a_refiner_starts_from_the_folder(run, tokenizer):
    folder = exported(f"ckpt={run}")
    config = composed(
        "train", "+experiment=digits_c2i", f"tokenizer.ckpt={tokenizer}", f"model.weights={folder}", *REFINER.split()
    )
    state = module_from_config(config).network.state_dict()
    assert weights_hash(state) == weights_hash(load_file(folder / "refiner" / "model.safetensors"))
