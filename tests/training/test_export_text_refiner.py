"""python -m grn.export of text refiners: folders that sample as the run does; the authors' files; hostile folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import PROMPTS, TEXTS, composed, files, write_run
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from grn.checkpoints.exported import FILES, TEXT_FILES, load_exported_refiner
from grn.checkpoints.native import weights_hash
from grn.checkpoints.official_text_refiner import load_official_text_refiner
from grn.networks.text_encoder import ByteT5
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.failures import MISTAKES, explain
from grn.sampling.loading import load_refiner
from grn.sampling.pipeline import GRNPipeline
from grn.sampling.sample import sample
from grn.training.export import export
from grn.weights.kinds import INDEX
from grn.weights.pretrained import MAX_CONFIG_BYTES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("texts"), TEXTS)


@pytest.fixture
def folder(run, tmp_path):
    return exported(f"ckpt={run}", f"out={tmp_path}/export")


@pytest.fixture(scope="module")
def umt5(tmp_path_factory):
    """A umT5 and its tokenizer, as transformers writes them, of features 24 wide."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("umt5")
    sizes = {"d_model": 24, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    UMT5EncoderModel(UMT5Config(vocab_size=32, **sizes)).save_pretrained(folder)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    T5Tokenizer([(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0).save_pretrained(folder)
    return folder


@pytest.fixture
def official(golden, tmp_path):
    """Arguments of an export of the golden weights, as the authors' file would hold them."""
    state = {k.removeprefix("state."): v for k, v in golden("text_bit").items() if k.startswith("state.")}
    torch.save(state, tmp_path / "GRN_T2I_2B.pth")
    torch.manual_seed(0)
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=4, dim=8, decoder_dim=8, multipliers=(1, 2), blocks_per_stage=1, temporal=(False,)
    ).save_pretrained(tmp_path / "tokenizer")
    model = "model=text_refiner_2B model.attention=one_way model.channels=12 "
    model += "model.depth=4 model.width=64 model.heads=4 model.text_width=24"
    return [f"ckpt={tmp_path}/GRN_T2I_2B.pth", f"tokenizer.ckpt={tokenizer}", f"out={tmp_path}/export", *model.split()]


def of_umt5(umt5):
    return ["text_encoder=t5", f"text_encoder.path={umt5}", "text_encoder.dtype=float32"]


def exported(*overrides):
    return export(composed("export", *overrides))


def complaint_of(call):
    with pytest.raises(MISTAKES) as error:
        call()
    message = explain(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def drawn(ckpt, *prompts):
    return GRNPipeline.from_pretrained(ckpt)(prompts, seed=1, num_inference_steps=3, output_type="latent").tokens


def test_layout(run, folder, tmp_path):
    assert set(files(folder)) == {*FILES, *TEXT_FILES}
    index = json.loads((folder / INDEX).read_text())
    kinds = [index[part] for part in ("refiner", "tokenizer", "text_encoder")]
    assert kinds == [["grn", "TextRefiner"], ["grn", "HBQTokenizer"], ["grn", "ByteT5"]]
    assert (len(index["prompts"]), index["negative_prompt"], index["size"]) == (100, "", [16, 32])
    module, source = load_refiner(str(run))
    of_refiner, of_tokenizer, of_encoder = (
        json.loads((folder / part / "config.json").read_text())["_provenance"]
        for part in ("refiner", "tokenizer", "text_encoder")
    )
    assert (of_refiner["source"], of_refiner["step"], of_tokenizer["step"]) == (source["ckpt"], 12, 5)
    assert of_refiner["sha256"] == weights_hash(module.refiner.state_dict())
    assert of_encoder == {"sha256": weights_hash(module.text_encoder.state_dict())}
    other = exported(f"ckpt={run}", f"out={tmp_path}/other", "prompts=[a seven]", "width=16", "sampler=linear")
    index = json.loads((other / INDEX).read_text())
    assert (index["prompts"], index["size"]) == (["a seven"], [16, 16])
    assert index["sampler"]["schedule"] == {"_class_name": "Linear", "steps": 50}


def test_a_folder_samples_as_its_run(run, folder, tmp_path):
    outs = [
        sample(composed("sample", f"ckpt={ckpt}", "num=4", "device=cpu", f"out={tmp_path}/{number}"))
        for number, ckpt in enumerate((run, folder))
    ]
    for name in ("samples.png", "refinement.gif"):
        assert files(outs[0])[name] == files(outs[1])[name]
    reports = [json.loads((out / "samples.json").read_text()) for out in outs]
    for key in ("step", "prompts", "steps", "entropy", "sampler"):
        assert reports[0][key] == reports[1][key], key
    encoder = ByteT5.from_pretrained(folder, subfolder="text_encoder")
    assert torch.equal(encoder(PROMPTS)[0], load_refiner(str(run))[0].text_encoder(PROMPTS)[0])


def test_half_precision(run, folder, tmp_path):
    """Every part of the folder is half as large, and comes back as float32 numbers that bfloat16 has."""
    half = exported(f"ckpt={run}", "dtype=bfloat16", f"out={tmp_path}/half")
    modules = [load_refiner(str(path))[0] for path in (folder, half)]
    for name in ("refiner", "tokenizer", "text_encoder"):
        whole, own = (load_file(path / name / "model.safetensors") for path in (folder, half))
        assert whole.keys() == own.keys()
        assert all(torch.equal(own[key], value.bfloat16()) for key, value in whole.items())
    values = [value for part in modules[1].parts.values() for value in part.state_dict().values()]
    assert all(value.dtype == torch.float32 for value in values if value.is_floating_point())
    first, second = (torch.cat([x.flatten() for x in module.refiner.parameters()]) for module in modules)
    assert not torch.equal(first, second)
    assert torch.equal(first.bfloat16(), second.bfloat16())
    assert drawn(half, "a red square").shape == drawn(folder, "a red square").shape


def test_a_frozen_encoder_is_referred_to(umt5, tmp_path, monkeypatch):
    umt5 = shutil.copytree(umt5, tmp_path / "umt5")
    sizes = [*TEXTS[: TEXTS.index(" text_encoder")].split(), "training.size=[16,32]", "model.text_width=24"]
    run = write_run(tmp_path / "run", " ".join([*sizes, *of_umt5(umt5), "text_encoder.max_length=32"]))
    folder = exported(f"ckpt={run}", f"out={tmp_path}/export")
    assert set(files(folder)) == {*FILES, "text_encoder/config.json"}
    reference = folder / "text_encoder" / "config.json"
    said = json.loads(reference.read_text())
    assert (said["_class_name"], said["path"], said["dtype"]) == ("PretrainedT5", str(umt5), "float32")
    assert torch.equal(drawn(folder, *PROMPTS), drawn(run, *PROMPTS))
    monkeypatch.chdir(umt5.parent)  # what is referred to from here is found from elsewhere, too
    before = files(folder)
    earlier = {name: value for name, value in said.items() if name != "clean_captions"}  # as exports were before
    reference.write_text(json.dumps(earlier))
    assert GRNPipeline.from_pretrained(folder).bundle.text_encoder.clean_captions is False
    reference.write_bytes(before["text_encoder/config.json"])
    rewrite(reference, path=umt5.name)
    assert files(GRNPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")) == before
    shutil.rmtree(umt5)
    for ckpt in (run, tmp_path / "again"):
        complaint = complaint_of(lambda ckpt=ckpt: GRNPipeline.from_pretrained(ckpt))
        assert f"text_encoder.path: no folder {umt5}" in complaint


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_authors_file_becomes_a_folder(official, umt5, golden):
    folder = exported(*official, *of_umt5(umt5), "height=32", "width=48", "sampler=cosine", "sampler.guidance=3")
    module, source = load_refiner(str(folder))
    assert source == {"ckpt": str(folder), "step": None}
    assert (module.labeling, module.size, module.sampler.guidance) == ("bit", (32, 48), 3)
    state = load_official_text_refiner(official[0].removeprefix("ckpt="))
    assert weights_hash(module.refiner.state_dict()) == weights_hash(state)
    assert drawn(folder, "a cat", "").shape == (2, 12, 1, 8, 12)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["text_encoder=none"], "text_encoder: the authors' text refiners need theirs, text_encoder=umt5_xxl"),
        (["text_encoder=byt5_tiny"], "the authors' text refiners need theirs"),
        (["text_encoder=t5", "text_encoder.path=/nowhere"], "text_encoder.path: no folder /nowhere"),
        (["model.text_width=16"], "is of another size than the model"),
        (["ema=0.5"], "ema=0.5: "),
        (["format=official"], "ckpt is one of the authors' files already"),
        (["height=30"], "multiples of the tokenizer's stride 4, got (30, 256)"),
        (["model=class_refiner"], "is not an official"),
        (["model.attention=full"], "GRN_T2I_2B.pth has one_way attention, the model full: set model.attention=one_way"),
    ],
)
def test_mistakes_with_the_authors_file(official, umt5, overrides, complaint, tmp_path):
    if overrides == ["model=class_refiner"]:
        official = [it for it in official if not it.startswith("model")]
    encoder = [] if overrides[0].startswith("text_encoder=") else of_umt5(umt5)
    assert complaint in complaint_of(lambda: exported(*official, *encoder, *overrides))
    assert not (tmp_path / "export").exists()


def test_mistakes_with_a_run(run, folder, tmp_path):
    out = f"out={tmp_path}/other"
    assert "no text encoder" in complaint_of(lambda: exported(f"ckpt={run}", "format=official", out))
    endless = "x" * MAX_CONFIG_BYTES
    message = complaint_of(lambda: exported(f"ckpt={run}", f"prompts=[{endless}]", out))
    assert message == "prompts: 1 of them are too long for model_index.json; give fewer: prompts=[...]"
    assert "is an export already" in complaint_of(lambda: exported(f"ckpt={folder}", out))
    assert "choose among float32, bfloat16" in complaint_of(lambda: exported(f"ckpt={run}", "dtype=int8", out))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"text_encoder": ["transformers", "UMT5EncoderModel"]}, "this GRN reads a ByteT5 or a PretrainedT5 only"),
        ({"text_encoder": None}, "text_encoder is None, this GRN reads a ByteT5 or a PretrainedT5 only"),
        ({"text_encoder": ["grn", "PretrainedT5"]}, "is of a ByteT5, not of a PretrainedT5"),
        ({"refiner": ["grn", "CaptionedRefiner"]}, "this GRN reads a ClassRefiner or a TextRefiner only"),
        ({"refiner": ["grn", "ClassRefiner"]}, "is of a TextRefiner, not of a ClassRefiner"),
        ({"prompts": []}, "prompts cannot be []"),
        ({"prompts": "a cat"}, "prompts cannot be a cat"),
        ({"prompts": ["a", {"_target_": "os.system"}]}, "prompts cannot be ['a', {"),
        ({"negative_prompt": None}, "negative_prompt cannot be None"),
        ({"size": [16]}, "size cannot be [16]"),
        ({"size": [True, 16]}, "size cannot be [True, 16]"),
        ({"size": [16, 10**9]}, "size cannot be [16, 1000000000]"),
        ({"size": {"a": 1, "b": 2}}, "size cannot be {'a': 1, 'b': 2}"),
    ],
)
def test_an_index_that_is_none(folder, changes, expected):
    rewrite(folder / INDEX, **changes)
    assert expected in complaint_of(lambda: load_refiner(str(folder)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"path": "/nowhere/at/all"}, "which may be edited, refers to something missing: text_encoder.path: no folder"),
        ({"path": None}, "refers to no PretrainedT5: path is odd or missing"),
        ({"weights": 3}, "refers to no PretrainedT5: weights is odd or missing"),
        ({"dtype": "float8"}, "text_encoder.dtype=float8: choose among"),
        ({"max_length": 0}, "text_encoder.max_length=0 must be a whole number"),
        ({"max_length": 513}, "text_encoder.max_length=513 is more than model.max_text=512"),
        ({"trust_remote_code": True}, "refers to no PretrainedT5: trust_remote_code is odd or missing"),
        ({"_class_name": "UMT5EncoderModel"}, "is of a UMT5EncoderModel, not of a PretrainedT5"),
        ({"_format": 2}, "is of format 2"),
    ],
)
def test_a_reference_that_is_none(official, umt5, changes, expected):
    folder = exported(*official, *of_umt5(umt5))
    rewrite(folder / "text_encoder" / "config.json", **changes)
    assert expected in complaint_of(lambda: load_refiner(str(folder)))


@pytest.mark.parametrize("lost", TEXT_FILES)
def test_a_file_that_is_lost(folder, lost):
    (folder / lost).unlink()
    assert complaint_of(lambda: load_refiner(str(folder))).startswith(f"ckpt: {folder}")


def test_only_its_own_is_replaced(run, folder):
    module = load_exported_refiner(folder)
    exported(f"ckpt={run}", f"out={folder}", "prompts=[a seven]")
    assert module.text.prompts != load_exported_refiner(folder).text.prompts == ["a seven"]
    shutil.copy(folder / INDEX, folder / "text_encoder" / "notes.txt")
    message = complaint_of(lambda: exported(f"ckpt={run}", f"out={folder}"))
    assert "text_encoder holds other files (notes.txt)" in message
