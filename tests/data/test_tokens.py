"""Token shards: a refiner sees the tokens that it would see from pixels; and nothing in a shard is trusted."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tars import write_tar

from grn.data.images import ImageShardsDataModule
from grn.data.prepare.encode import encode
from grn.data.prepare.shard_encoder import ShardEncoder
from grn.data.tokens import TokenDecoder, TokenShardsDataModule, read_array, unpack_bits, write_array
from grn.media.pixels import from_uint8
from grn.media.skips import Reason, Skip
from grn.method.sampler import Sampler
from grn.networks.class_refiner import ClassRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.sampling.bundle import RefinerBundle
from grn.toys.digits import DigitsSource
from grn.training import RefinerModule, TokenizerModule
from grn.training.building import check_fits


def config(folder, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(
            "encode", [f"ckpt={folder}/tokenizer", f"paths.data={folder}/data", "data.num_workers=0", *overrides]
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits, a tokenizer, and the digits' tokens with both views."""
    folder = tmp_path_factory.mktemp("tokens")
    DigitsSource().write(folder / "data" / "digits")
    torch.manual_seed(0)
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=3, dim=8, decoder_dim=8, multipliers=(1, 2), blocks_per_stage=1, temporal=(False,)
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    assert encode(config(folder, "flip=true"))
    return folder


def pixels(folder, **arguments):
    root = folder / "data" / "digits"
    return ImageShardsDataModule(
        **{"name": "digits", "root": root, "image_size": 32, "num_labels": 10, "batch_size": 64} | arguments
    )


def tokens(folder, **arguments):
    return TokenShardsDataModule(
        **{"name": "tokens", "root": folder / "data" / "digits_tokens", "batch_size": 64} | arguments
    )


def refiner(folder, **sizes):
    sizes = {"channels": 3, "classes": 8, "num_labels": 10, "size": 8} | sizes
    network = ClassRefiner(
        depth=1, width=32, heads=2, bottleneck=8, context_start=0, context_tokens=2, mlp_ratio=2.0, **sizes
    )
    module = RefinerModule(RefinerBundle(network, HBQTokenizer.from_pretrained(folder / "tokenizer"), Sampler()))
    manifest = json.loads((folder / "data" / "digits_tokens" / "manifest.json").read_text())
    module.checkpoint_extras = {"tokenizer": {"sha256": manifest["tokenizer"]["sha256"]}}
    return module


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_refiner_sees_the_same_tokens_in_the_same_order(folder, flip, workers):
    module = refiner(folder)
    arguments = {"flip": flip, "num_workers": workers, "worker_streams": 2, "seed": 3, "shuffle_buffer": 100}
    from_pixels, from_tokens = (make(folder, **arguments).train_dataloader() for make in (pixels, tokens))
    steps = 30  # more than one pass
    for _, real, packed in zip(range(steps), from_pixels, from_tokens):
        assert real["key"] == packed["key"]
        assert real["caption"] == packed["caption"]
        assert torch.equal(real["label"], packed["label"])
        assert torch.equal(module.tokenize(real), module.tokenize(packed))


def test_an_image_takes_few_bytes(folder):
    batch = next(iter(tokens(folder).val_dataloader()))
    assert batch["bits"].shape == (64, 1, 8, 8, 2)  # 3 channels of 3 rounds: 9 bits
    assert batch["bits"].dtype == torch.uint8


@pytest.mark.parametrize("labeling", ["ind", "bit"])
def test_both_labelings(folder, labeling):
    tokenizer = HBQTokenizer.from_pretrained(folder / "tokenizer")
    real, packed = (next(iter(make(folder).val_dataloader())) for make in (pixels, tokens))
    expected = tokenizer.tokenize(from_uint8(real["pixels"]), labeling)
    assert torch.equal(unpack_bits(packed["bits"], 3, 3, labeling), expected)


def test_the_manifest_tells_what_they_are(folder):
    data = tokens(folder)
    assert (data.num_labels, data.num_train_samples, data.label_names[3]) == (10, 1500, "three")
    assert (data.manifest["views"], data.manifest["token_shape"]) == (2, [1, 8, 8])
    assert data.tokenizer.keys() == {"sha256", "latent_channels", "rounds", "source"}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(
            "train", ["+experiment=c2i_ind_B", "data=tokens", f"data.root={data.root}", "tokenizer.ckpt=x"]
        )
    assert composed.trainer.max_steps == round(600 * 1500 / 1024)
    assert isinstance(instantiate(composed.data), TokenShardsDataModule)


def test_encoding_again_does_nothing(folder):
    assert not encode(config(folder, "flip=true"))
    with pytest.raises(UserError, match=r"flip=True, not False.*overwrite=true"):
        encode(config(folder, "flip=false"))


def test_without_mirrored_views(folder):
    assert encode(config(folder, f"out={folder}/plain"))  # digits: a mirrored one is none
    data = tokens(folder, root=folder / "plain")
    assert not data.flip
    with pytest.raises(UserError, match="flip=true"):
        tokens(folder, root=folder / "plain", flip=True)


@pytest.mark.full  # of any shards: test_shards.py
def test_processes_write_the_same_bytes(folder):
    assert encode(config(folder, f"out={folder}/one"))
    assert encode(config(folder, f"out={folder}/two", "num_workers=2"))
    shards = sorted((folder / "one").glob("*.tar"))
    assert shards
    for shard in shards:
        assert shard.read_bytes() == (folder / "two" / shard.name).read_bytes()


def test_what_does_not_fit_is_refused(folder):
    data = tokens(folder)
    check_fits(refiner(folder), data)
    other = refiner(folder)
    other.checkpoint_extras["tokenizer"]["sha256"] = "0" * 64
    with pytest.raises(UserError, match="was encoded by another tokenizer"):
        check_fits(other, data)
    with pytest.raises(UserError, match=r"model\.size=4 does not fit"):
        check_fits(refiner(folder, size=4), data)
    with pytest.raises(UserError, match=r"model\.num_labels=11 does not fit"):
        check_fits(refiner(folder, num_labels=11), data)
    tokenizer = HBQTokenizer.from_pretrained(folder / "tokenizer")
    with pytest.raises(UserError, match="trains from pixels"):
        check_fits(TokenizerModule(tokenizer, perceptual_weight=0.0, gan_weight=0.0), data)
    with pytest.raises(UserError, match=r"holds no token shards.*grn\.encode"):
        tokens(folder, root=folder / "data" / "digits")
    with pytest.raises(UserError, match=r"data\.root=None holds no token shards"):
        tokens(folder, root=None)
    with pytest.raises(UserError, match="only pixels are encoded"):
        encode(config(folder, "data=tokens", f"data.root={data.root}", "flip=false"))
    with pytest.raises(UserError, match="height 30 is not a multiple of the tokenizer's stride 4"):
        encode(config(folder, "data.image_size=30"))


def test_scores_see_pixels(folder):
    data = tokens(folder)
    batch = next(iter(data.split_dataloader("val")))
    assert torch.equal(batch["pixels"], next(iter(pixels(folder).split_dataloader("val")))["pixels"])
    data.pixels = "/nowhere"
    with pytest.raises(UserError, match=r"data\.pixels: .*/nowhere has not their val shards"):
        data.split_dataloader("val")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_trainers_precision_changes_no_token(folder, precision):
    """Runs from pixels tokenize within the trainer's autocast; shards were encoded in float32."""
    module = refiner(folder)
    real, packed = (next(iter(make(folder).val_dataloader())) for make in (pixels, tokens))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        assert torch.equal(module.tokenize(real), module.tokenize(packed))


def test_shards_may_be_given_one_by_one(folder, tmp_path):
    root = folder / "data" / "digits"
    shards = f"data.train=[{root}/train-000000.tar,{root}/train-000001.tar]"
    assert encode(config(folder, shards, f"out={tmp_path}/some"))
    data = tokens(folder, root=tmp_path / "some")
    assert data.num_train_samples == 300
    assert data.manifest["source"]["train"] == [f"{root}/train-00000{i}.tar" for i in (0, 1)]
    assert len(next(iter(data.split_dataloader("train")))["key"]) == 64


def test_processes_take_turns_at_the_accelerators(folder, monkeypatch):
    """Those of all ranks of a machine."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    taken = []
    for rank in range(3):
        for index in range(2):
            encoder = ShardEncoder({}, None, mirrored=False, batch_size=1, first_process=2 * rank)
            network = HBQTokenizer.from_pretrained(folder / "tokenizer")
            monkeypatch.setattr(network, "to", lambda *device, network=network, **_: network)
            encoder.start_worker(index, network)
            taken.append(encoder.device)
    assert taken == ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:0", "cuda:1"]


def npy(array, **options):
    data = io.BytesIO()
    np.save(data, array, **options)
    return data.getvalue()


GOOD = np.arange(24, dtype=np.uint8).reshape(1, 1, 3, 4, 2)


def test_arrays_come_back():
    assert (read_array(write_array(GOOD)) == GOOD).all()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an array",
        write_array(GOOD)[:-1],
        write_array(GOOD) + b"x",
        npy(GOOD.astype(np.int16)),
        npy(GOOD[0]),
        npy(np.asfortranarray(GOOD)),
        npy(np.array([{}], dtype=object), allow_pickle=True),
        write_array(GOOD).replace(b"(1, 1, 3, 4, 2)", b"(9, 9, 9, 9, 9)"),
        write_array(GOOD).replace(b"(1, 1, 3, 4, 2)", b"(1,-1, 3, 4,-2)"),
        write_array(GOOD).replace(b"(1, 1, 3, 4, 2), }    ", b"(True, True, 3, 4, 2)}"),
        write_array(GOOD).replace(b"(1, 1, 3, 4, 2)", b"(24,1,1,1, 1j) "),
        write_array(GOOD).replace(b"(1, 1, 3, 4, 2)", b"[1, 1, 3, 4, 2]"),
        write_array(GOOD).replace(b"'|u1'", b"'|Z1'"),
    ],
)
def test_arrays_that_are_none(data):
    with pytest.raises(Skip) as caught:
        read_array(data)
    assert caught.value.reason is Reason.BAD_TOKENS


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"shape": (1, 3, 4), "width": 3}, Reason.BAD_TOKENS),
        ({"shape": (1, 4, 3), "width": 2}, Reason.BAD_TOKENS),
        ({"shape": (1, 3, 4), "width": 2, "num_labels": 3}, Reason.NO_LABEL),
    ],
)
def test_samples_that_do_not_fit(arguments, reason):
    raw = {"__key__": "k", "tokens.npy": write_array(GOOD)}
    with pytest.raises(Skip) as caught:
        TokenDecoder(**arguments)(raw, 0)
    assert caught.value.reason is reason
    assert TokenDecoder(shape=(1, 3, 4), width=2)(raw, 0)["bits"].shape == (1, 3, 4, 2)
    with pytest.raises(Skip) as caught:
        TokenDecoder(shape=(1, 3, 4), width=2)({"__key__": "k"}, 0)
    assert caught.value.reason is Reason.NO_TOKENS


def test_a_missing_view_is_noticed():
    decoder = TokenDecoder(shape=(1, 3, 4), width=2, flip=True)
    raw = [{"__key__": f"{i}", "tokens.npy": write_array(GOOD)} for i in range(20)]
    outcomes = set()
    for sample in raw:
        try:
            decoder(sample, 0)
            outcomes.add("as it is")
        except Skip as skip:
            outcomes.add(skip.reason)
    assert outcomes == {"as it is", Reason.BAD_TOKENS}


def test_shards_without_a_usable_sample_are_described(folder, tmp_path):
    for split in ("train", "val"):
        write_tar(
            tmp_path / f"{split}-0.tar", [(f"a.{i}.{suffix}", b"3") for i in range(3) for suffix in ("png", "cls")]
        )
    with pytest.raises(
        UserError, match=r"\(no (image|label): 1\); keys end at the first dot .* 'a' has 0\.png, 0\.cls"
    ):
        encode(config(folder, f"data.root={tmp_path}", f"out={tmp_path}/tokens"))


def test_bad_samples_and_broken_shards_are_listed(folder, tmp_path):
    """Somebody else's shards: what cannot be used is named with its reason, the rest is encoded in its order."""
    good = next((folder / "data" / "digits").glob("train-*.tar"))
    with tarfile.open(good) as tar:
        entries = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()[:9]]  # three samples
    entries[0] = (entries[0][0].replace(".cls", ".json"), b"[]")  # of the first, in whatever order
    for name in ("train-0.tar", "val-0.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            for entry, data in [*entries, ("broken.png", b"no picture"), ("broken.cls", b"3")]:
                info = tarfile.TarInfo(entry)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    whole = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-1.tar").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "tokens"
    assert encode(config(folder, f"data.root={tmp_path}", f"out={out}"))
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    reasons = {(line["shard"], line["item"]): line["reason"] for line in rejected}
    assert reasons["train-000000.tar", "broken"] == Reason.UNDECODABLE_IMAGE.value
    assert reasons["train-000001.tar", str(tmp_path / "train-1.tar")].startswith(Reason.BROKEN_SHARD.value)
    data = tokens(folder, root=out)
    batches = list(data.val_dataloader())
    kept = [key for batch in batches for key in batch["key"]]
    assert kept == [entries[3][0].split(".")[0], entries[6][0].split(".")[0]]
    assert data.manifest["splits"]["val"] == data.manifest["splits"]["val"] | {"samples": 2, "rejected": 2}
