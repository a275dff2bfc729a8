"""Token shards of captioned data: a text refiner learns from them what it would from pixels; nothing is trusted."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save
from tars import write_tar
from text_shards import config, frozen, of, write_clips, write_images, write_text_encoder, write_tokenizer
from torch.nn.modules.module import register_module_forward_pre_hook

from grn.data.captions import Captions
from grn.data.mixed_packs import MixedPacksDataModule
from grn.data.prepare.encode import encode
from grn.data.text_features import FeatureForm, write_features
from grn.data.text_images import TextImageDataModule
from grn.data.text_tokens import TextTokenDecoder, TextTokensDataModule
from grn.data.tokens import TokenShardsDataModule, write_array
from grn.media.skips import Reason, Skip
from grn.networks.text_encoder import ByteT5
from grn.networks.tokenizer import Encoder
from grn.runtime.errors import UserError
from grn.training.building import check_fits, module_from_config, tell_packing

CAPTIONS = "{txt:1,long:2}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images and clips, their tokens (those of images mirrored, too, and with features), and the networks."""
    folder = tmp_path_factory.mktemp("text_tokens")
    for name, write in (("images", write_images), ("clips", write_clips)):
        (folder / name).mkdir()
        write(folder / name)
    write_tokenizer(folder / "tokenizer")
    write_text_encoder(folder / "umt5")
    assert encode(config("encode", folder, *images(folder), "flip=true", "batch_size=7", *frozen(folder)))
    assert encode(config("encode", folder, *clips(folder), "batch_size=3"))
    return folder


def images(folder, **others):
    others = {"captions": CAPTIONS, "flip": "true"} | others
    return of(data="captioned_image", root=folder / "images", **others)


def clips(folder, **others):
    return of(data="captioned_video", root=folder / "clips", **others)


def tokens(folder, name="captioned_image_tokens", **others):
    others = {"captions": CAPTIONS} | others if name == "captioned_image_tokens" else others
    return of(data="captioned_tokens", root=folder / name, **others)


def data(folder, overrides):
    try:
        return instantiate(config("train", folder, *overrides).data)
    except InstantiationException as error:
        raise error.__cause__ from None


def refiner(folder, encoder=None):
    made = config(
        "train", folder, "model=text_refiner_tiny", "model.depth=1", "model.width=24", "model.heads=2",
        "model.channels=6", "model.classes=2", "model.text_width=16", "model.mlp_ratio=11", "training=text_refiner",
        "training.prompts=[a seven]", "training.size=[32,32]", "data=captioned_image", *(encoder or frozen(folder)),
    )  # fmt: skip
    module = module_from_config(made)
    torch.nn.init.normal_(module.refiner.head.out.weight, std=0.2, generator=torch.Generator().manual_seed(4))
    module.log = lambda *_, **__: None
    module._trainer = SimpleNamespace(
        world_size=1,
        global_rank=0,
        accumulate_grad_batches=1,
        global_step=5,
        log_every_n_steps=1000,
        strategy=SimpleNamespace(reduce=lambda tensor, reduce_op: tensor),
    )
    module.setup("fit")
    return module


def packs(module, datamodule, number):
    check_fits(module, datamodule)
    tell_packing(module, datamodule)
    return [batch for _, batch in zip(range(number), datamodule.train_dataloader())]


@pytest.mark.parametrize(("kind", "name"), [(images, "captioned_image_tokens"), (clips, "captioned_video_tokens")])
def test_a_refiner_learns_the_same_as_from_pixels(folder, kind, name):
    """Packs, tokens, flips, captions, dropout, features and so the loss."""
    module, seeded = refiner(folder), {"caption_dropout": "0.3", "seed": 3}
    from_pixels, from_tokens = data(folder, kind(folder, **seeded)), data(folder, tokens(folder, name, **seeded))
    captions, shapes = [], set()
    for real, packed in zip(packs(module, from_pixels, 5), packs(module, from_tokens, 5), strict=True):
        assert ("pixels" in packed, "features" in packed) == (False, name == "captioned_image_tokens")
        for key in ("key", "caption", "packs", "tokens", "max_tokens"):
            assert real[key] == packed[key]
        assert all(map(torch.equal, module.tokenize(real), module.tokenize(packed)))
        losses = [module.training_step(batch, 0) for batch in (packed, real)]
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
        assert module.flop_per_sample(packed) < module.flop_per_sample(real)
        captions += real["caption"]
        shapes |= {tuple(bits.shape[:3]) for bits in packed["bits"]}
    assert 0.1 < captions.count("") / len(captions) < 0.5
    assert len(set(captions)) > (2 if kind is images else 1)
    assert len(shapes) > 1


def test_features_spare_the_encoder(folder, monkeypatch):
    module = refiner(folder)
    encoder, asked = module.frozen_encoder, []
    tokenize = encoder.tokenize
    monkeypatch.setattr(encoder, "tokenize", lambda captions: asked.extend(captions) or tokenize(captions))
    datamodule = data(folder, tokens(folder, caption_dropout="0.5"))
    for batch in packs(module, datamodule, 3):
        module.training_step(batch, 0)
    for batch in datamodule.val_dataloader():
        module.on_validation_epoch_start()
        module.validation_step(batch, 0)
    assert asked == [""]  # of captions that are dropped, once
    without = data(folder, tokens(folder, features="false"))
    for batch in packs(module, without, 1):
        assert "features" not in batch
        module.training_step(batch, 0)
    assert len(asked) > 2


def test_features_are_in_the_encoders_own_precision(folder, tmp_path):
    half = frozen(folder, dtype="bfloat16")
    assert encode(config("encode", folder, *images(folder), f"out={tmp_path}/half", "flip=false", *half))
    module = refiner(folder, half)
    seeded = {"caption_dropout": "0", "flip": "false"}
    arguments = of(data="captioned_tokens", root=tmp_path / "half", captions=CAPTIONS, **seeded)
    from_pixels, from_tokens = data(folder, images(folder, **seeded)), data(folder, arguments)
    ((real,), (packed,)) = packs(module, from_pixels, 1), packs(module, from_tokens, 1)
    assert {features.dtype for features in packed["features"]} == {torch.bfloat16}
    losses = [module.training_step(batch, 0) for batch in (packed, real)]
    torch.testing.assert_close(*losses, atol=1e-3, rtol=1e-3)
    losses = []
    for kind, batches in (("pixels", from_pixels.val_dataloader()), ("bits", from_tokens.val_dataloader())):
        module.log = lambda name, value, **_: name == "val/loss" and losses.append(value)
        batch = next(iter(batches))
        assert kind in batch
        module.on_validation_epoch_start()
        module.validation_step(batch, 0)
        module.on_validation_epoch_end()
    torch.testing.assert_close(*losses, atol=1e-3, rtol=1e-3)


def test_the_same_tokens_in_whatever_batches(folder, tmp_path):
    arguments = [*images(folder), "flip=true", f"out={tmp_path}/alone"]
    assert encode(config("encode", folder, *arguments, "batch_size=1", *frozen(folder)))
    batches = [data(folder, of(data="captioned_tokens", root=root, captions=CAPTIONS)).val_dataloader()
               for root in (folder / "captioned_image_tokens", tmp_path / "alone")]  # fmt: skip
    for first, second in zip(*batches, strict=True):
        assert (first["key"], first["caption"]) == (second["key"], second["caption"])
        assert all(map(torch.equal, first["bits"], second["bits"]))
        for own, other in zip(first["features"], second["features"], strict=True):
            torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    assert not encode(config("encode", folder, *arguments, *frozen(folder)))
    with pytest.raises(UserError, match=r"text_encoder=.*overwrite=true"):
        encode(config("encode", folder, *arguments))


def test_long_clips_are_encoded_in_a_stream_and_to_the_same_tokens(folder, tmp_path, monkeypatch):
    seen = []

    def encoded(out):
        seen.clear()
        with register_module_forward_pre_hook(lambda it, given: _note(seen, it, given[0])):
            encode(config("encode", folder, *clips(folder), "flip=true", "batch_size=8", f"out={tmp_path}/{out}"))
        return [path.read_bytes() for path in sorted((tmp_path / out).glob("*.tar"))]

    whole = encoded("whole")
    assert max(seen) == 17
    monkeypatch.setattr("grn.data.prepare.shard_encoder.WHOLE_PIXELS", 2 * 9 * 32 * 32)
    assert encoded("stream") == whole
    assert set(seen) == {1, 4, 5, 9}  # those of 5 and of 9 frames come in twos, at once


def _note(seen, module, given):
    if isinstance(module, Encoder):
        seen.append(given.shape[2])


@pytest.mark.full  # of any shards: test_shards.py
@pytest.mark.slow
def test_the_same_shards_by_two_processes(folder, tmp_path):
    assert encode(config("encode", folder, *clips(folder), f"out={tmp_path}/two", "batch_size=3", "num_workers=2"))
    for shard in (folder / "captioned_video_tokens").glob("*.tar"):
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()


def test_packs_go_on_exactly(folder):
    def loader():
        module = data(folder, tokens(folder, caption_dropout="0.3"))
        tell_packing(refiner(folder), module)
        return module.train_dataloader()

    whole = loader()
    batches = [batch for _, batch in zip(range(5), whole)]
    first = loader()
    _ = [batch for _, batch in zip(range(2), first)]
    second = loader()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for expected, found in zip(batches[2:], second):
        assert (found["key"], found["caption"]) == (expected["key"], expected["caption"])
        assert all(map(torch.equal, found["bits"], expected["bits"]))


@pytest.mark.parametrize(("kind", "name"), [(images, "captioned_image_tokens"), (clips, "captioned_video_tokens")])
def test_scores_see_the_pixels_that_were_encoded(folder, kind, name):
    from_pixels, from_tokens = data(folder, kind(folder)), data(folder, tokens(folder, name))
    for real, found in zip(*(d.split_dataloader("val") for d in (from_pixels, from_tokens)), strict=True):
        assert (real["key"], real["caption"]) == (found["key"], found["caption"])
        assert all(map(torch.equal, real["pixels"], found["pixels"]))
    from_tokens.pixels = "/nowhere"
    with pytest.raises(UserError, match=r"data\.pixels: .*/nowhere has not their val shards"):
        from_tokens.split_dataloader("val")


def mixture(folder, **images_differ):
    parts = {"images": tokens(folder, **({"features": "false"} | images_differ))}
    parts["clips"] = tokens(folder, "captioned_video_tokens")
    parts = {name: data(folder, arguments) for name, arguments in parts.items()}
    return MixedPacksDataModule(name="mixture", parts=parts, weights={"images": 1.0, "clips": 1.0}, seed=1)


def test_packs_hold_images_and_clips(folder):
    module, mixed = refiner(folder), mixture(folder)
    mixed.setup("fit")
    latents = set()
    for batch in packs(module, mixed, 6):
        assert module.training_step(batch, 0).isfinite()
        assert batch["tokens"] <= batch["max_tokens"]
        latents |= {len(bits) for bits in batch["bits"]}
    assert latents == {1, 2, 3, 4, 5}


def test_mixtures_of_kinds_are_refused(folder):
    with pytest.raises(UserError, match=r"data\.parts are {'images': 'tokens with text features', 'clips': 'tokens'}"):
        mixture(folder, features="null").setup("fit")
    mixed = mixture(folder)
    mixed.parts["clips"] = data(folder, clips(folder))
    with pytest.raises(UserError, match=r"'clips': 'pixels'}: packs hold one kind; encode the others"):
        mixed.setup("fit")


def test_the_mixture_of_tokens_has_a_config(folder):
    names = {"images": "captioned_image_tokens", "clips": "captioned_video_tokens"}
    roots = [f"data.parts.{part}.root={folder}/{name}" for part, name in names.items()]
    made = config(
        "train", folder, "data=captioned_image_and_video_tokens", *roots, "data.max_tokens=900", "data.num_workers=0"
    )
    for name, part in made.data.parts.items():
        assert (part.key, part.max_tokens, part.num_workers) == (f"data.parts.{name}", 900, 0)
    made.data.parts.images.features = False
    assert instantiate(made.data).parts.keys() == {"images", "clips"}


def test_digits_are_packed_from_tokens_as_from_pixels():
    names = "digits_t2i_tokens", "digits_t2i"
    from_tokens, from_pixels = (config("train", "x", f"data={name}").data for name in names)
    own = {"_target_", "name", "root", "flip"}  # the shards tell whether there is something to flip
    shared = (from_tokens.keys() & from_pixels.keys()) - own - {"pixels"}
    assert {key: from_tokens[key] for key in shared} == {key: from_pixels[key] for key in shared}
    assert {"max_tokens", "lookahead", "captions", "caption_dropout", "shuffle_buffer", "batch_size"} <= shared


def test_the_manifest_tells_what_they_are(folder):
    of_images, of_clips = (
        data(folder, tokens(folder, name)) for name in ("captioned_image_tokens", "captioned_video_tokens")
    )
    text = of_images.manifest["text"]
    assert (text["sizes"], text["latents"], text["captions"]) == ([[4, 4], [4, 6]], 1, ["txt", "long"])
    assert {key: text["encoder"][key] for key in ("width", "dtype", "max_length")} == {
        "width": 16, "dtype": "float32", "max_length": 24,
    }  # fmt: skip
    assert text["encoder"]["clean_captions"] is False
    assert (of_clips.manifest["text"]["latents"], of_clips.manifest["text"]["encoder"]) == (5, None)
    assert (of_images.flip, of_clips.flip) == (True, False)


def test_what_does_not_fit_is_refused(folder):
    of_images = data(folder, tokens(folder))
    module = refiner(folder)
    module.checkpoint_extras["tokenizer"]["sha256"] = "0" * 64
    with pytest.raises(UserError, match="was encoded by another tokenizer"):
        check_fits(module, of_images)
    write_text_encoder(folder / "other", seed=1)
    shorter, coarser = [*frozen(folder), "text_encoder.max_length=20"], frozen(folder, dtype="bfloat16")
    cleaning = [*frozen(folder), "text_encoder.clean_captions=true"]
    for encoder in (frozen(folder, "other"), shorter, coarser, cleaning):
        with pytest.raises(UserError, match=r"has features of .*, and text_encoder is another one.*features=false"):
            check_fits(refiner(folder, encoder), of_images)
    with pytest.raises(UserError, match="text_encoder is another one"):  # of a kind that is never encoded with
        of_images.check_text_encoder(ByteT5(width=16, depth=1, heads=2, hidden=16))
    own = ["text_encoder=byt5_tiny", "text_encoder.width=16"]
    with pytest.raises(UserError, match="text_encoder is trained along"):
        check_fits(refiner(folder, own), of_images)
    check_fits(refiner(folder, own), data(folder, tokens(folder, features="false")))
    with pytest.raises(UserError, match=r"data\.max_tokens=81 holds no sample of 5x4x6 tokens, 122 at least"):
        check_fits(refiner(folder), data(folder, [*tokens(folder, "captioned_video_tokens"), "data.max_tokens=81"]))
    with pytest.raises(UserError, match=r"data\.features=true, but .* has none"):
        data(folder, tokens(folder, "captioned_video_tokens", features="true"))
    with pytest.raises(UserError, match=r"data\.captions=.* has no features of short, only of txt, long"):
        data(folder, tokens(folder, captions="{short:1}"))
    with pytest.raises(
        UserError, match=r"data\.caption_prefix='<T2I>': .* has features of captions with '': give that"
    ):
        data(folder, tokens(folder, caption_prefix="'<T2I>'"))
    with pytest.raises(UserError, match=r"data\.sentence_dropout=0\.5: .* has features of whole captions alone"):
        data(folder, tokens(folder, sentence_dropout="0.5"))
    with pytest.raises(UserError, match="holds tokens of captioned samples: choose data=captioned_tokens"):
        TokenShardsDataModule(name="tokens", root=folder / "captioned_image_tokens", batch_size=1)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["data=captioned_image", "data.pixels={0.06M:1,0.25M:1}"],
            r"give one budget, such as data\.pixels=0\.06M",
        ),
        (["data=captioned_image", "data.pixels=null", "data.resolutions=[[32,36]]"], "width 36 is not a multiple"),
        (["data=captioned_video", "data.fps=8", "data.max_frames=9"], "3 frames are not 1"),
        (["data=captioned_image", "text_encoder=byt5_tiny"], "text_encoder: this one is trained along"),
        (["data=digits", "text_encoder=t5", "text_encoder.path=x"], "data=digits is not for text refiners"),
        (["data=captioned_image_and_video"], "only pixels are encoded, one data set at a time"),
    ],
)
def test_what_cannot_be_encoded_is_refused(folder, overrides, complaint):
    with pytest.raises(UserError, match=complaint):
        encode(config("encode", folder, "flip=false", f"out={folder}/refused", "batch_size=1", *overrides))
    assert not (folder / "refused").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"text": 3},
        {"text.sizes": []},
        {"text.sizes": [[4, 4, 4]]},
        {"text.sizes": [[4, 2**40]]},
        {"text.latents": -1},
        {"text.captions": [1]},
        {"text.encoder": {"sha256": "x"}},
        {"text.encoder.dtype": "int8"},
        {"text.encoder.width": 2**40},
        {"views": 3},
        {"source": None},
        {"source.root": 3},
        {"source.train": {"a": 1}},
        {"source.num_workers": 7},
        {"source.resolutions": "many"},
        {"source.max_aspect": "wide"},
        {"source.min_size": None},
    ],
)
def test_manifests_are_not_trusted(folder, tmp_path, damage):
    root = shutil.copytree(folder / "captioned_image_tokens", tmp_path / "tokens")
    manifest = OmegaConf.create(json.loads((root / "manifest.json").read_text()))
    for key, value in damage.items():
        OmegaConf.update(manifest, key, value, merge=False)
    (root / "manifest.json").write_text(json.dumps(OmegaConf.to_container(manifest)))
    with pytest.raises(UserError, match="is not a manifest of token shards: encode them again"):
        TextTokensDataModule(name="tokens", root=root, batch_size=1, max_tokens=300)


FORM = FeatureForm(width=2, dtype=torch.bfloat16, max_length=3)
GOOD = torch.ones(3, 2, dtype=torch.bfloat16)


def raw(**entries):
    views = torch.arange(24, dtype=torch.uint8).view(1, 1, 3, 4, 2).numpy()
    return {"__key__": "k", "txt": b"a seven", "tokens.npy": write_array(views)} | entries


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, Reason.NO_FEATURES),
        (b"", Reason.BAD_FEATURES),
        (b"\xff" * 100, Reason.BAD_FEATURES),
        (write_features({"txt": GOOD})[:-1], Reason.BAD_FEATURES),
        (save({"long": GOOD}), Reason.NO_FEATURES),
        (save({"txt": GOOD.float()}), Reason.BAD_FEATURES),
        (save({"txt": GOOD[0]}), Reason.BAD_FEATURES),
        (save({"txt": GOOD[:0]}), Reason.BAD_FEATURES),
        (save({"txt": torch.cat([GOOD, GOOD])}), Reason.BAD_FEATURES),
        (save({"txt": GOOD[:, :1].contiguous()}), Reason.BAD_FEATURES),
        (save({"txt": GOOD / 0}), Reason.BAD_FEATURES),
        (Reason.OVERSIZE_ENTRY, Reason.OVERSIZE_ENTRY),
    ],
)
def test_features_are_not_trusted(data, reason):
    arguments = {"sizes": frozenset([(3, 4)]), "latents": 1, "width": 2, "captions": Captions((("txt", 1.0),))}
    decode = TextTokenDecoder(**arguments, features=FORM)
    good = decode(raw(**{"features.safetensors": write_features({"txt": GOOD})}), 0)
    assert torch.equal(good["features"], GOOD)
    entries = {} if data is None else {"features.safetensors": data}
    with pytest.raises(Skip) as caught:
        decode(raw(**entries), 0)
    assert caught.value.reason is reason
    assert "features" not in TextTokenDecoder(**arguments)(raw(**entries), 0)


@pytest.mark.parametrize(
    ("changes", "entries", "reason"),
    [
        ({"sizes": frozenset([(4, 3)])}, {}, Reason.BAD_TOKENS),
        ({"latents": 0}, {}, Reason.BAD_TOKENS),
        ({"width": 3}, {}, Reason.BAD_TOKENS),
        ({}, {"tokens.npy": None}, Reason.NO_TOKENS),
        ({}, {"txt": b""}, Reason.NO_CAPTION),
    ],
)
def test_samples_that_do_not_fit(changes, entries, reason):
    arguments = {"sizes": frozenset([(3, 4)]), "latents": 1, "width": 2, "captions": Captions((("txt", 1.0),))}
    assert TextTokenDecoder(**arguments)(raw(), 0)["bits"].shape == (1, 3, 4, 2)
    with pytest.raises(Skip) as caught:
        TextTokenDecoder(**(arguments | changes))(raw(**entries), 0)
    assert caught.value.reason is reason


def test_samples_that_cannot_be_encoded_are_listed(folder, tmp_path):
    """And those that can keep their captions unchanged, whatever else stands beside them."""
    module = data(folder, images(folder))
    assert isinstance(module, TextImageDataModule)
    (shard,) = module.urls("val")
    first, second, *_ = module._stream("val").shard(shard)
    suffixes = ("png", "txt", "json")
    entries = [(f"{r['__key__']}.{suffix}", r[suffix]) for r in (first, second) for suffix in suffixes]
    entries += [("torn.png", first["png"][:60]), ("torn.txt", b"torn"), ("mute.png", first["png"])]
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}-0.tar", entries)
    assert encode(
        config("encode", folder, *images(folder), f"data.root={tmp_path}", f"out={tmp_path}/tokens", *frozen(folder))
    )
    rejected = [json.loads(line) for line in (tmp_path / "tokens" / "rejected.jsonl").read_text().splitlines()]
    assert [(r["item"], r["reason"]) for r in rejected if r["split"] == "train"] == [
        ("torn", Reason.UNDECODABLE_IMAGE.value), ("mute", Reason.NO_CAPTION.value),
    ]  # fmt: skip
    found = data(folder, of(data="captioned_tokens", root=tmp_path / "tokens"))
    (written,) = found.urls("train")
    kept = list(found._stream("train").shard(written))
    assert [r["__key__"] for r in kept] == [first["__key__"], second["__key__"]]
    assert all(own[suffix] == r[suffix] for own, r in zip(kept, (first, second)) for suffix in ("txt", "json"))


def test_a_manifest_runs_no_command(folder, tmp_path, monkeypatch):
    """Unless the user says that this one may."""
    shutil.copytree(folder / "captioned_image_tokens", tmp_path / "tokens")
    path = tmp_path / "tokens" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["source"]["val"] = f"pipe:touch {tmp_path}/ran; cat {folder}/images/val-0.tar"
    path.write_text(json.dumps(manifest))
    datamodule = data(tmp_path, tokens(tmp_path, "tokens"))
    with pytest.raises(
        UserError, match=r"manifest\.json has shards read by a command.*give data\.pixels=.*GRN_TRUST=pipe$"
    ):
        list(datamodule.split_dataloader("val"))
    assert not (tmp_path / "ran").exists()
    given = data(tmp_path, tokens(tmp_path, "tokens", pixels=folder / "images"))
    monkeypatch.setenv("GRN_TRUST", "pipe")
    for trusted in (given, datamodule):
        assert not (tmp_path / "ran").exists()
        assert sum(len(batch["key"]) for batch in trusted.split_dataloader("val")) == 10
    assert (tmp_path / "ran").exists()
