"""Captioned shards, a tokenizer and a frozen text encoder, all tiny, and what `grn.encode` makes of them, for tests."""

import io

import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from tars import write_tar
from test_text_videos import clip
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.config_folder import CONF

KEYS = ("batch_size=1", "num_workers=0", "rank_streams=1", "worker_streams=1", "max_tokens=300", "lookahead=8")
SIZES = "[[32,32],[32,48]]"


def picture(size, seed):
    noise = torch.rand(size[1] // 4, size[0] // 4, 3, generator=torch.Generator().manual_seed(seed))
    file = io.BytesIO()
    Image.fromarray((noise * 255).byte().numpy()).resize(size, Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def write_images(root):
    """Forty images of two shapes, each with two captions."""
    for split, count in {"train": 30, "val": 10}.items():
        entries = []
        for number in range(count):
            entries += [
                (f"{split}{number:03d}.png", picture((32 if number % 3 else 50, 32), number)),
                (f"{split}{number:03d}.txt", f"a picture of {number}".encode()),
                (f"{split}{number:03d}.json", f'{{"long": "a long picture of the number {number}"}}'.encode()),
            ]
        write_tar(root / f"{split}-0.tar", entries)


def write_clips(root):
    """Of 5 to 17 frames, which are all of a video, so that training draws what evaluation takes."""
    for split in ("train", "val"):
        entries = []
        for number in range(8):
            frames = 1 + 4 * (1 + number % 4)
            entries += [(f"{split}{number}.mp4", clip(frames, width=32)), (f"{split}{number}.txt", b"a clip")]
        write_tar(root / f"{split}-0.tar", entries)


def write_tokenizer(folder, seed=0):
    """Stride 8, four frames a latent; 3 channels of 2 rounds."""
    torch.manual_seed(seed)
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=2, dim=8, decoder_dim=8, multipliers=(1, 2, 2), blocks_per_stage=1,
        temporal=(True, True),
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def write_text_encoder(folder, seed=0):
    """A umT5, 16 wide, and its tokenizer of letters."""
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    UMT5EncoderModel(UMT5Config(vocab_size=64, **sizes)).save_pretrained(folder)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    T5Tokenizer([(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0).save_pretrained(folder)


def config(verb, folder, *overrides):
    """Of `grn.encode` or `grn.train` in `folder`, which holds all of the above."""
    checkpoint = f"ckpt={folder}/tokenizer" if verb == "encode" else f"tokenizer.ckpt={folder}/tokenizer"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(verb, [checkpoint, f"paths.data={folder}", *overrides])


def of(*, data, root, **others):
    """Overrides that choose small `data` in `root`."""
    given = [f"data={data}", f"data.root={root}", *(f"data.{key}" for key in KEYS)]
    if data != "captioned_tokens":
        given += ["data.pixels=null", f"data.resolutions={SIZES}"]
    if data == "captioned_video":
        given += ["data.max_frames=17"]
    return [*given, *(f"++data.{key}={value}" for key, value in others.items())]


def frozen(folder, name="umt5", dtype="float32"):
    """Overrides that choose the text encoder."""
    return ["text_encoder=t5", f"text_encoder.path={folder}/{name}", f"text_encoder.dtype={dtype}",
            "text_encoder.max_length=24"]  # fmt: skip
