import json
import math

import commands
import pytest
import torch
from hydra import compose, initialize_config_dir

from grn.benchmarks.bench import bench
from grn.benchmarks.tokenizer import VARIANTS, flop_per_image, measure_streams, psnr
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError

SMALL = (
    "model=tokenizer_small",
    "device=cpu",
    "repeats=1",
    "benchmark.image_size=16",
    "benchmark.batch_size=2",
    "benchmark.stream.frames=[1,2]",
    "benchmark.stream.image_size=8",
    "benchmark.stream.dim=4",
    "benchmark.stream.decoder_dim=4",
)


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("bench", list(overrides))


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return HBQTokenizer(latent_channels=3, dim=8, decoder_dim=8, multipliers=(1, 2), temporal=(True,)).eval()


def test_report_is_complete(tmp_path, capsys):
    bench(composed(*SMALL, f"out={tmp_path}"))
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["benchmark"] == "tokenizer"
    assert report["machine"]["device"] == "cpu"
    assert report["sizes"]["batch_size"] == 2
    assert report["sizes"]["model"]["dim"] == 16
    assert report["matmul_flop_per_second"].keys() == {"float32", "bfloat16"}
    assert all(rate > 0 for rate in report["matmul_flop_per_second"].values())
    for task in ("encode", "decode"):
        rows = report[task]
        assert [row["variant"] for row in rows] == ["float32", "bfloat16"]
        for row in rows:
            measured = {"images_per_second", "ratio", "peak_bytes", "flop_per_image", "flop_per_second"}
            assert all(row[key] > 0 for key in measured | {"share_of_matmul"})
            assert row["psnr"] > (80 if row["dtype"] == "float32" else 30)
        assert rows[0]["ratio"] == 1
        assert rows[-1]["peak_bytes"] < rows[0]["peak_bytes"]
    assert report["encode"][0]["equal_tokens"] == 1
    stream = report["stream"]
    assert (stream["image_size"], stream["model"]["dim"]) == (8, 4)
    assert [row["frames"] for row in stream["rows"]] == [1, 2]
    printed = capsys.readouterr().out
    assert all(variant.name in printed for variant in VARIANTS if not variant.compile)


def test_a_trained_tokenizer_brings_its_sizes(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "trained")
    report = bench(
        composed(*SMALL, f"out={tmp_path}", f"benchmark.ckpt={tmp_path / 'trained'}", "benchmark.stream.frames=[1,3]")
    )
    assert report["sizes"]["model"]["dim"] == 8
    with pytest.raises(UserError, match=r"benchmark\.ckpt"):
        bench(composed(*SMALL, f"out={tmp_path}", "benchmark.ckpt=/nowhere"))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["benchmark.image_size=18"], "height 18 .* stride 4; the nearest is 20"),
        (["repeats=0"], "repeats=0"),
        (["model=class_refiner"], "model=tokenizer"),
        (["benchmark.stream.frames=[1,0]"], "0 frames"),
    ],
)
def test_mistakes(overrides, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        bench(composed(*SMALL, f"out={tmp_path}", *overrides))


def test_work_is_counted(tokenizer):
    """An image's 3x3x3 convolutions are counted as the 3x3 ones that they come to."""
    work = flop_per_image(tokenizer, "encode", torch.Size([2, 3, 1, 16, 16]))
    rest, thrice = 0, 0  # of the one stage that downsamples: its convolution is 2-D all along
    for name, module in tokenizer.encoder.named_modules():
        if not isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)) or name.endswith("downsample.time"):
            continue
        side = 4 if name.startswith(("stages.1", "middle", "head", "to_latent")) or name.endswith("space") else 8
        flop = 2 * module.weight[:, :, 0].numel() * side**2 if module.weight.ndim == 5 else 0
        if module.weight.ndim == 5 and module.kernel_size[0] == 3:
            thrice += flop
        else:
            rest += flop or 2 * module.weight.numel() * side**2
    attention = 2 * 2 * 16**2 * 16  # 16 positions of 16 channels, twice
    assert work == thrice + rest + attention


def test_psnr():
    reference = torch.zeros(1, 3, 4, 4)
    assert math.isinf(psnr(reference, reference))
    assert psnr(reference + 0.02, reference) == pytest.approx(40, abs=1e-4)
    assert psnr(reference + 7, reference + 2) == math.inf  # both clipped to 1


def test_streams_need_constant_memory():
    sizes = {"latent_channels": 2, "dim": 4, "decoder_dim": 4, "multipliers": (1, 1, 1), "blocks_per_stage": 1}
    network = HBQTokenizer(**sizes, temporal=(True, True))
    first, last = measure_streams(network, torch.device("cpu"), frames=[33, 257], image_size=16)
    for task in ("encode", "decode"):
        assert first[task]["ratio"] == 1
        assert 0.9 < last[task]["ratio"] < 1.1
    clip = torch.zeros(1, 3, 257, 16, 16)  # which the whole of the difference would have to hold
    assert last["encode"]["peak_bytes"] - first["encode"]["peak_bytes"] < clip.nbytes // 100


@pytest.mark.slow
@pytest.mark.parametrize(("argument", "expected"), [("--help", "python -m grn.bench"), ("--cfg", "grn.benchmarks")])
def test_the_command_explains_itself(argument, expected):
    done = commands.run("grn.bench", argument, *(["job"] if argument == "--cfg" else []), cwd=CONF.parent)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
