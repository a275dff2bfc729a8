import dataclasses
import json
import shutil

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

from grn.checkpoints.native import build_network
from grn.networks.text_encoder import ByteT5, PretrainedT5, clean
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError

SIZES = {"width": 16, "depth": 2, "heads": 4, "hidden": 32, "max_length": 24}
HOSTILE = [
    "",
    "x" * 10_000,
    "half a \ud83d character",
    "\udc80\udcff bytes that are no UTF-8",
    "數字三在八的左邊",
    "ثلاثة على يسار ثمانية",
    "\0\n\t\r",
    "</s><pad><unk><extra_id_0>",
    "🙂" * 100,
]


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ByteT5(**SIZES).eval()


@pytest.fixture
def folder(tmp_path):
    """A umT5 and its tokenizer, as transformers writes them."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    UMT5EncoderModel(UMT5Config(vocab_size=64, **sizes)).save_pretrained(tmp_path / "umt5")
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", "▁seven", "▁three"]
    T5Tokenizer([(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0).save_pretrained(
        tmp_path / "umt5"
    )
    return tmp_path / "umt5"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def complaint(**options):
    with pytest.raises(UserError) as error:
        PretrainedT5(**options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_batch_is_its_captions(encoder):
    captions = ["a three left of an eight", "", "a seven"]
    features, lengths = encoder(captions)
    assert lengths == [24, 1, 8]  # bytes, and the end; the first is cut
    assert features.shape == (33, 16)
    assert encoder.width == 16
    for caption, mine in zip(captions, features.split(lengths), strict=True):
        torch.testing.assert_close(mine, encoder([caption])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["trained", "frozen"])
def test_a_long_caption_pads_few_others(kind, encoder, folder, monkeypatch):
    monkeypatch.setattr("grn.networks.text_encoder.CALL", 300)
    monkeypatch.setattr("grn.networks.text_encoder.SHORT", 4)
    if kind == "frozen":
        encoder = PretrainedT5(path=str(folder), dtype="float32", max_length=24)
    captions = ["a three", "", "s" * 100, "ab", "seven three abc", "", "b" * 100, "a", "abc", "", "ba"] * 2
    shapes, encode = [], encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda ids, mask: shapes.append(tuple(ids.shape)) or encode(ids, mask))
    features, lengths = encoder(captions)
    assert lengths == [len(ids) for ids in encoder.tokenize(captions)]
    assert max(length for _, length in shapes) == 24
    assert all(count == 1 or count * max(length, 4) ** 2 <= 300 for count, length in shapes)
    assert sum(count for count, _ in shapes) == 22
    assert len(shapes) < 12
    for caption, mine in zip(captions, features.split(lengths), strict=True):
        torch.testing.assert_close(mine, encoder([caption])[0], atol=1e-5, rtol=1e-5)


def test_bytes_are_their_own_tokens(encoder):
    assert encoder.tokenize(["ab", "é", "\ud800"]) == [[100, 101, 1], [3 + 0xC3, 3 + 0xA9, 1], [3 + ord("?"), 1]]


def test_hostile_captions(encoder, folder):
    for text_encoder in (encoder, PretrainedT5(path=str(folder), max_length=24)):
        features, lengths = text_encoder(HOSTILE)
        assert len(features) == sum(lengths)
        assert all(1 <= length <= 24 for length in lengths)
        assert features.isfinite().all()


# What basic_clean and whitespace_clean of umT5's users (Wan, diffusers) make of the first, written down by hand.
CLEANED = {
    "\u201cseven\u201d isn\u2019t three": '"seven" isn\'t three',
    "seven &amp;amp; three": "seven & three",
    "seven &amp;lt; three&nbsp;a": "seven < three a",
    "  seven\n\n three\t\u3000a ": "seven three a",
    "\uff53\uff45\uff56\uff45\uff4e": "seven",
    "the caf\u00c3\u00a9": "the caf\u00e9",
    " \n": "",
}


def test_captions_are_cleaned_where_asked_for(folder):
    cleaning, plain = (PretrainedT5(path=str(folder), max_length=24, clean_captions=own) for own in (True, False))
    for raw, cleaned in CLEANED.items():
        assert clean(raw) == cleaned
        assert cleaning.tokenize([raw]) == plain.tokenize([cleaned]) == cleaning.tokenization([raw])
    assert cleaning.tokenize(["a\n&#97;"]) != plain.tokenize(["a\n&#97;"])
    assert torch.equal(cleaning(["seven\n&#97;"])[0], plain(["seven a"])[0])
    assert cleaning(HOSTILE)[0].isfinite().all()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = {
            name: compose("train", [f"text_encoder={name}", "trainer.max_steps=1"]).text_encoder.clean_captions
            for name in ("umt5_xxl", "t5", "byt5_tiny")
        }
    assert chosen == {"umt5_xxl": True, "t5": False, "byt5_tiny": False}
    with pytest.raises(UserError, match=r"^text_encoder\.clean_captions=yes must be true or false$"):
        ByteT5(**SIZES, clean_captions="yes")


def test_an_endless_caption_is_not_even_tokenized(encoder, monkeypatch):
    seen = []
    call = encoder.tokenizer.__call__
    monkeypatch.setattr(
        encoder, "tokenizer", lambda captions, **options: seen.extend(captions) or call(captions, **options)
    )
    assert len(encoder.tokenize(["y" * 10**7])[0]) == 24
    assert len(seen[0]) == 64 * 24


def test_it_is_trained_along(encoder):
    encoder(["a seven"])[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_a_pretrained_one_is_frozen(folder):
    encoder = PretrainedT5(path=str(folder), dtype="float32").train()
    assert not encoder.encoder.training
    features, lengths = encoder(["a seven"])
    assert lengths == [4]  # a space, a, seven, the end
    assert not features.requires_grad
    model = UMT5EncoderModel.from_pretrained(folder)
    ids = torch.tensor(encoder.tokenize(["a seven"]))
    torch.testing.assert_close(features, model.eval()(ids).last_hidden_state[0].detach())
    half = PretrainedT5(path=str(folder))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    close = half(["a seven"])[0]
    assert (close - features).norm() / features.norm() < 0.05


def test_weights_of_the_single_file_with_the_tokenizer_of_a_folder(folder, golden, tmp_path):
    state = {k.removeprefix("state."): v for k, v in golden("umt5").items() if k.startswith("state.")}
    torch.save(state, tmp_path / "umt5.pth")
    encoder = PretrainedT5(path=str(folder), weights=str(tmp_path / "umt5.pth"), dtype="float32")
    assert torch.equal(encoder.encoder.shared.weight, state["token_embedding.weight"])
    assert encoder(["a seven"])[0].isfinite().all()


def test_other_t5_and_a_tokenizer_from_elsewhere(folder, tmp_path):
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    encoder = PretrainedT5(path=str(tmp_path / "t5"), tokenizer=str(folder))
    assert isinstance(encoder.encoder, T5EncoderModel)
    assert complaint(path=str(tmp_path / "t5")).endswith("/t5 has no tokenizer; give one as text_encoder.tokenizer")


def test_what_cannot_be_had_is_one_line(folder, tmp_path):
    assert complaint(path="/nowhere/umt5").startswith("text_encoder.path: no folder /nowhere/umt5; give one, or a repo")
    message = complaint(path="google/umt5-xxl")  # the tests have no internet
    assert message.startswith("text_encoder.path: google/umt5-xxl is not a folder here, and not on the Hub (")
    assert message.endswith("); give a local folder")
    message = complaint(path=str(folder), tokenizer="google/umt5-xxl")
    assert message.startswith("text_encoder.tokenizer: google/umt5-xxl is not a folder here")
    for dtype in ("int8", "float16"):
        assert f"text_encoder.dtype={dtype}: choose among bfloat16, float32" in complaint(path=str(folder), dtype=dtype)
    assert "text_encoder.max_length=0 must be a whole number" in complaint(path=str(folder), max_length=0)
    assert "text_encoder.weights: no file /nowhere" in complaint(path=str(folder), weights="/nowhere")


def test_folders_of_something_else(folder, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"noise" * 100)
    assert complaint(path=str(damaged)).startswith(f"text_encoder.path: {damaged} cannot be read (")
    emptied = shutil.copytree(folder, tmp_path / "emptied")
    (emptied / "model.safetensors").unlink()
    assert complaint(path=str(emptied)).startswith(f"text_encoder.path: {emptied} cannot be read (")
    deeper = shutil.copytree(folder, tmp_path / "deeper")
    edit(deeper / "config.json", num_layers=3)
    assert "lacks the weights encoder.block.2.layer.0" in complaint(path=str(deeper))
    smaller = shutil.copytree(folder, tmp_path / "smaller")
    edit(smaller / "config.json", vocab_size=20)
    assert complaint(path=str(smaller)).startswith("text_encoder.")
    bert = shutil.copytree(folder, tmp_path / "bert")
    edit(bert / "config.json", model_type="bert")
    assert "is a bert; text encoders here are t5, mt5, umt5" in complaint(path=str(bert))


def test_a_folders_own_code_is_never_run(folder):
    """A model type that only code in the folder would know: transformers must not even ask."""
    edit(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit('executed')\n")
    assert complaint(path=str(folder)).startswith("text_encoder.path: ")


def test_configs():
    def config(name, *overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", ["tokenizer.ckpt=x", f"text_encoder={name}", *overrides]).text_encoder

    encoder = build_network(config("byt5_tiny"))
    assert encoder.width == 128
    assert sum(parameter.numel() for parameter in encoder.parameters()) < 500_000
    assert config("umt5_xxl").path == "google/umt5-xxl"
    with pytest.raises(InstantiationException, match=r"text_encoder\.path: no folder /nowhere"):
        instantiate(config("t5", "text_encoder.path=/nowhere"))


def test_what_is_cut_of_a_caption():
    """Bytes, and one token for the end: fifteen characters of sixteen tokens."""
    taken = ByteT5(width=8, depth=1, heads=1, hidden=8, max_length=16).tokenization
    assert not taken.is_cut("fifteen letters")
    assert taken.is_cut("sixteen letters!")
    assert taken.used("sixteen letters!") == "sixteen letters"
    assert taken.is_cut("an endless text " * 10_000)
    assert not taken.is_cut("")
    assert not dataclasses.replace(taken, clean_captions=True).is_cut("fifteen   letters  \n ")
