"""What grn.compare tells of two evaluations."""

import base64
import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from grn import compare as command
from grn.evaluation.compare import compare, differences, measured, read_result
from grn.media import pictures
from grn.runtime.errors import UserError

SHOWN = {"count": 12, "columns": 10, "height": 8, "width": 8, "scale": 12}


def evaluated(folder, *, temperature, fid, value):
    folder.mkdir(parents=True)
    images = torch.full((12, 3, 8, 8), value, dtype=torch.uint8) + torch.arange(12).view(-1, 1, 1, 1).to(torch.uint8)
    pictures.save(pictures.grid(images, 10, 12), folder / "samples.png")
    content = {"ckpt": "runs/x/last.ckpt", "step": 5, "num": 12, "seed": 3, "sampler": "...", "shown": SHOWN}
    content["settings"] = {"num": 12, "seed": 3, "sampler": {"temperature": temperature}}
    content["uncertainty"] = {"clip": 0.5}
    content["metrics"] = {"fid": fid, "clip": 25.0, "isc_mean": 9.0, "isc_std": 0.25}
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def both(tmp_path):
    return [
        evaluated(tmp_path / "a", temperature=1.0, fid=3.5, value=10),
        evaluated(tmp_path / "<b>" / "evaluation", temperature=1.2, fid=4.5, value=90).parent,
    ]


def test_only_what_differs_and_all_metrics(both):
    results = [read_result(str(folder)) for folder in both]
    assert differences(results)[1] == [["sampler.temperature", "1.0", "1.2"]]
    assert measured(results)[1] == [
        ["fid", "3.5", "4.5"],
        ["clip", "25 ± 0.5", "25 ± 0.5"],
        ["isc_mean", "9 ± 0.25", "9 ± 0.25"],
        ["isc_std", "0.25", "0.25"],
    ]


def test_the_page_has_the_same_samples_of_each(both, tmp_path, capsys):
    path = compare(OmegaConf.create({"results": [str(f) for f in both], "out": str(tmp_path / "out"), "samples": 11}))
    page = path.read_text()
    assert "sampler.temperature" in capsys.readouterr().out
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    found = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", page)]
    values = [np.asarray(Image.open(io.BytesIO(data))) for data in found]
    assert [int(image.min()) for image in values] == [10 + n for n in range(11)] + [90 + n for n in range(11)]
    assert all(image.shape == (8, 8, 3) and image.min() == image.max() for image in values)
    assert "seed 3" in page


@pytest.mark.parametrize("content", ["[", "{}", '{"metrics": {"fid": "x"}}', '{"metrics": {}, "shown": {"count": []}}'])
def test_damaged_results(tmp_path, both, content):
    (both[0] / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=r"^results: .*metrics\.json is damaged"):
        read_result(str(both[0]))
    with pytest.raises(UserError, match=r"has no metrics\.json"):
        read_result(str(tmp_path / "nothing"))


def test_brackets_are_no_markup(both, tmp_path, capsys):
    content = json.loads((both[0] / "metrics.json").read_text())
    content["settings"]["reference"] = "[/bold] [red]x"
    (both[0] / "metrics.json").write_text(json.dumps(content))
    compare(OmegaConf.create({"results": [str(f) for f in both], "out": str(tmp_path / "out"), "samples": 0}))
    assert "[/bold]" in capsys.readouterr().out


def test_pictures_of_another_size_are_left_out(both, tmp_path):
    Image.new("RGB", (7, 7)).save(both[0] / "samples.png")
    path = compare(OmegaConf.create({"results": [str(f) for f in both], "out": str(tmp_path / "out"), "samples": 5}))
    assert "base64" not in path.read_text()


def test_folders_are_words_of_the_command(both, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["grn.compare", "a", "<b>", f"out={tmp_path}/page", "samples=2"])
    command.main()
    assert (tmp_path / "page" / "compare.html").is_file()
    assert "4.5" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["grn.compare", "a"])
    with pytest.raises(SystemExit, match=r"^error: results=.*at least two folders"):
        command.main()
