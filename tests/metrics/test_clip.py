"""CLIP score, against the same computed by hand from a tiny CLIP's parts."""

import pytest
import torch
from tiny_clip import write_tiny_clip
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, resize

from grn.metrics.clip import CLIPEncoder, CLIPScore
from grn.runtime.errors import UserError

PROMPTS = ["a red dog", "a photo of a blue dog", "x" * 500, ""]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_tiny_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make(folder):
    def make(**keys):
        return CLIPScore(**{"path": folder, "train": tuple, "val": tuple, "prompts": PROMPTS} | keys)

    return make


@torch.no_grad()
def by_hand(folder, images, prompts):
    """Towers and projections, written out: cosines float [N] and the image features float [N, width]."""
    from transformers import CLIPModel, CLIPTokenizer

    network, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    pixels = normalize(images.float() / 255, MEAN, STD)
    own = network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=True, max_length=24, return_tensors="pt")["input_ids"]
        states = network.text_model(input_ids=ids).last_hidden_state
        rows.append(network.text_projection(states[:, -1]))
    asked = torch.cat(rows)
    return torch.cosine_similarity(own, asked), own / own.norm(dim=1, keepdim=True)


def test_it_is_the_cosine_of_samples_and_their_prompts(folder, images, make):
    score = make()
    numbers = torch.arange(12) % 4
    for part in (slice(0, 5), slice(5, 12)):
        score.update(images[part], numbers[part])
    cosines, _ = by_hand(folder, images, [PROMPTS[n] for n in numbers])
    expected = 100 * cosines.clamp_min(0)
    assert expected.max() > 1
    assert (expected == 0).any()  # so that the cut is tested
    assert score.compute() == {"clip": pytest.approx(expected.mean().item(), rel=1e-4)}
    half = score.uncertainty()["clip"]
    assert half == pytest.approx(1.959964 * expected.std().item() / 12**0.5, rel=1e-4)
    score.reset()
    with pytest.raises(UserError, match=r"^scores\.clip: no images"):
        score.compute()


def test_images_of_any_size_are_prepared_as_clip_was_trained(folder, images):
    large = torch.randint(0, 256, (3, 48, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    smaller = resize(large, [32, 64], InterpolationMode.BICUBIC, antialias=True)[:, :, 16:48]
    encoder = CLIPEncoder(folder)
    both = encoder.images([large, images[0]])
    assert both.shape == (2, encoder.width)
    torch.testing.assert_close(both[0], encoder.images([smaller])[0], atol=0.02, rtol=0)
    torch.testing.assert_close(both[1], encoder.images(images[:1])[0])


def test_against_images_of_a_split(folder, images, make):
    score = make(val=lambda: [{"pixels": images[:8]}], against="val", prompts=None)
    score.update(images[8:])
    _, features = by_hand(folder, images, PROMPTS[:1])
    direction = features[:8].sum(dim=0)
    expected = 100 * torch.cosine_similarity(features[8:], direction[None]).clamp_min(0).mean()
    assert score.compute() == {"clip_image": pytest.approx(expected.item(), rel=1e-4)}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"prompts": None}, r"^scores\.clip\.against=prompts: these samples have no prompts"),
        ({"against": "nothing"}, r"^scores\.clip\.against=nothing: choose among"),
        ({"bf16": "yes"}, r"^scores\.clip\.bf16=yes"),
        ({"path": ""}, r"^scores\.clip\.path=: give"),
        ({"path": "/nowhere"}, r"^scores\.clip\.path: no folder /nowhere"),
        (
            {"path": "grn-tests/nothing"},
            r"^scores\.clip\.path: grn-tests/nothing is not a folder here, and not on the Hub",
        ),
    ],
)
def test_mistakes(make, keys, line):
    with pytest.raises(UserError, match=line):
        make(**keys)


def test_another_network_is_refused(tmp_path, make):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"^scores\.clip\.path: .* cannot be read"):
        make(path=str(tmp_path))
    from transformers import CLIPVisionConfig, CLIPVisionModel

    CLIPVisionModel(
        CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32)
    ).save_pretrained(tmp_path / "vision")
    with pytest.raises(UserError, match=r"^scores\.clip\.path: .*(lacks the weights|cannot be read)"):
        make(path=str(tmp_path / "vision"))
