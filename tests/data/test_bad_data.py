"""Data that people have, given to the commands that read data: each ends in one line that says what to do."""

import sys

import pytest
from tars import write_tar
from test_survey import SHARDS

from grn import encode, evaluate, prepare, train

TRAIN = (
    "+experiment=digits_t2i data=captioned_image data.pixels=null data.resolutions=[[32,32],[32,48]] "
    "training.size=[32,32] "
    "data.max_tokens=600 data.batch_size=1 data.num_workers=0 data.rank_streams=1 data.worker_streams=1 "
    "data.shuffle_buffer=8 data.lookahead=4 model.channels=3 model.classes=4 model.depth=1 "
    "scores=none logger=none training.warmup_steps=1 trainer.max_steps=2"
)
CASES = [  # command, its arguments, what the line says
    (train, f"{TRAIN} data.train=s9://b/a.tar data.val=good.tar", "data.train: shards are not read from s9://"),
    (train, f"{TRAIN} data.train=good.tar data.val=ais://b/a.tar", "data.val: shards are not read from ais://"),
    (
        train,
        f"{TRAIN} data.train=http://127.0.0.1:9/a.tar data.val=good.tar",
        "data.train: the shard http://127.0.0.1:9/a.tar cannot be reached (ClientConnectorError",
    ),
    (train, f"{TRAIN} data.train=memory://b/a.tar data.val=good.tar", "cannot be reached (there is no such file)"),
    (train, f"{TRAIN} data.train=dots.tar data.val=dots.tar", "keys end at the first dot of a name"),
    (train, f"{TRAIN} data.train=videos.tar data.val=videos.tar", "videos are read by data=video"),
    (
        prepare,
        "data=captioned_image root=heic",
        "holds no files *.{png,jpg,jpeg,webp} or the like; it has .heic 3, .txt 3",
    ),
    (prepare, "data=video root=heic", "holds no files *.{mp4,webm,mkv,mov} or the like; it has .heic 3, .txt 3"),
    (encode, "ckpt=tokenizer data=captioned_image data.root=null data.train=s9://b/a.tar data.val=x", "s9://"),
    (
        evaluate,
        "ckpt=tokenizer data=imagenet data.num_labels=null scores=none data.image_size=32 data.batch_size=1 "
        "data.num_workers=0 data.train=good.tar data.val=dots.tar out=results device=cpu",
        "data.val: the held-out shards have no usable sample (no image: 1); keys end at the first dot of a name",
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that holds all of it, and a tokenizer."""
    from text_shards import write_tokenizer

    folder = tmp_path_factory.mktemp("bad")
    write_tokenizer(folder / "tokenizer")
    for name in ("dots", "videos"):
        write_tar(folder / f"{name}.tar", SHARDS[name])
    write_tar(folder / "good.tar", SHARDS["no captions"])
    (folder / "heic").mkdir()
    for number in range(3):
        (folder / "heic" / f"{number}.heic").write_bytes(b"x")
        (folder / "heic" / f"{number}.txt").write_text("a picture")
    return folder


@pytest.mark.parametrize(("command", "arguments", "said"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_bad_data_end_in_one_line(place, monkeypatch, command, arguments, said):
    monkeypatch.setattr("grn.data.stream.remote.PAUSE", 0.01)
    monkeypatch.chdir(place)
    monkeypatch.setenv("GRN_DATA", str(place / "data"))
    monkeypatch.setenv("GRN_RUNS", str(place / "runs"))
    given = arguments.split()
    if command is train:
        given += [f"tokenizer.ckpt={place}/tokenizer", "overwrite=true"]
    monkeypatch.setattr(sys, "argv", [command.__name__, *given])
    with pytest.raises(SystemExit) as exit:
        command.main()
    assert str(exit.value.code).startswith("error: ")
    assert said in exit.value.code
    assert "\n" not in exit.value.code
