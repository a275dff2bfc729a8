"""The trained critters that stand in this repository: small, and they listen."""

import pytest
import torch

from grn.runtime.config_folder import CONF
from grn.sampling.pipeline import GRNPipeline
from grn.toys.critters import BACKGROUNDS, COLORS

MODEL = CONF.parent / "experiments" / "critters" / "model"
ASKED = [("blue", "red"), ("pink", "white"), ("yellow", "black"), ("green", "navy")]


def rgb(code):
    return torch.tensor([int(code[place : place + 2], 16) for place in (1, 3, 5)], dtype=torch.float32)


def test_it_is_small():
    assert sum(path.stat().st_size for path in MODEL.rglob("*")) <= 6 * 2**20


@pytest.mark.parametrize("update", ["redraw", "psi"])
def test_it_draws_what_prompts_say(update):
    """Of a body and what is behind it: the pixels in the middle of the lower edge, and in the upper corners."""
    prompts = [f"a {color} block critter with two eyes, a smile and no hat on {ground}" for color, ground in ASKED]
    images = GRNPipeline.from_pretrained(MODEL)(prompts, seed=1, num_inference_steps=8, update=update, output_type="pt")
    pixels = images.images.float()
    for image, (color, ground) in zip(pixels, ASKED):
        assert (image[:, 58:62, 30:34].mean(dim=(1, 2)) - rgb(COLORS[color])).abs().max() < 32, (color, ground)
        corners = torch.cat([image[:, :3, :3].flatten(1), image[:, :3, -3:].flatten(1)], dim=1)
        assert (corners.mean(dim=1) - rgb(BACKGROUNDS[ground])).abs().max() < 32, (color, ground)
