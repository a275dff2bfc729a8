"""GenEval's rules on detections made by hand, for every tag; the networks by tiny ones of random weights."""

import math

import pytest
import torch
from tiny_clip import write_tiny_clip

from grn.metrics import geneval
from grn.metrics.clip import CLIPEncoder
from grn.metrics.geneval import COLOURS, ColourReader, Detection, GenEval, Mask2Former, cut_out, is_right, relations
from grn.runtime.errors import UserError


def at(x, y, *, name="cat", score=0.95, side=10.0):
    """A detection of a square around a centre."""
    return Detection(name, score, (x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def judged(asked, detections, colors=()):
    """Colours are those of the objects by their left edge."""
    told = {tuple(d.box): colour for d, colour in zip(detections, colors)}
    return is_right(asked, detections, lambda objects: [told[tuple(it.box)] for it in objects])


def line(tag, *include, exclude=()):
    return {"tag": tag, "prompt": "x", "include": list(include), "exclude": list(exclude)}


def one(name, count=1, **more):
    return {"class": name, "count": count} | more


def test_single_object():
    asked = line("single_object", one("cat"))
    assert judged(asked, [at(0, 0)])
    assert judged(asked, [at(0, 0), at(30, 0), at(0, 30, name="dog")])  # more of them do no harm
    assert not judged(asked, [])
    assert not judged(asked, [at(0, 0, name="dog")])
    assert judged(asked, [at(0, 0, score=0.31)])
    assert not judged(asked, [at(0, 0, score=0.3)])  # the threshold must be exceeded


def test_two_objects():
    asked = line("two_object", one("cat"), one("dog"))
    assert judged(asked, [at(0, 0), at(0, 0, name="dog")])  # overlap is allowed
    assert not judged(asked, [at(0, 0), at(50, 0)])


def test_counting():
    asked = line("counting", one("cat", 3), exclude=[one("cat", 4)])
    three = [at(20 * n, 0) for n in range(3)]
    assert judged(asked, three)
    assert not judged(asked, three[:2])
    assert not judged(asked, [*three, at(90, 0, score=0.91)])
    assert judged(asked, [*three, at(90, 0, score=0.9)])  # of this tag, only the sure ones count
    assert not judged(asked, [*three[:2], at(90, 0, score=0.6)])
    many = line("counting", one("cat", 16), exclude=[one("cat", 17)])
    assert judged(many, [at(20 * n, 0) for n in range(30)])  # no more than 16 are looked at


def test_colours():
    asked = line("colors", one("cat", color="red"))
    assert judged(asked, [at(0, 0)], ["red"])
    assert not judged(asked, [at(0, 0)], ["blue"])
    # The surest detections are those whose colour is asked, as many as are wanted.
    both = [at(0, 0, score=0.5), at(50, 0, score=0.9)]
    assert judged(asked, both, ["blue", "red"])
    assert not judged(asked, both, ["red", "blue"])
    two = line("colors", one("cat", 2, color="red"))
    assert judged(two, both, ["red", "red"])
    assert not judged(two, both, ["red", "blue"])


def test_attribution_of_colours():
    asked = line("color_attr", one("cat", color="red"), one("dog", color="blue"))
    pair = [at(0, 0), at(50, 0, name="dog")]
    assert judged(asked, pair, ["red", "blue"])
    assert not judged(asked, pair, ["blue", "red"])


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-50, 0, {"left of"}),
        (50, 0, {"right of"}),
        (0, -50, {"above"}),
        (0, 50, {"below"}),
        (50, -50, {"right of", "above"}),
        (50, 20, {"right of"}),  # (50 - 2, 20 - 2) / 53.9 = (0.89, 0.33)
        (2.0, 0, set()),  # within 0.1 of both sides together, 20
        (2.1, 0, set()),  # beyond it, but only by a twentieth of the offset
        (3.9, 0, set()),  # 1.9 / 3.9 < 0.5
        (4.1, 0, {"right of"}),  # 2.1 / 4.1 > 0.5
        (0, 0, set()),
    ],
)
def test_where_one_lies_seen_from_another(x, y, expected):
    assert relations(at(x, y), at(0, 0)) == expected


def test_position():
    asked = line("position", one("dog"), one("cat", position=["left of", 0]))
    assert judged(asked, [at(0, 0, name="dog"), at(-40, 0)])
    assert not judged(asked, [at(0, 0, name="dog"), at(40, 0)])
    assert not judged(asked, [at(-40, 0)])  # there is nothing that it could be left of
    # Every one that is wanted, of each group.
    two = line("position", one("dog", 2), one("cat", position=["left of", 0]))
    assert judged(two, [at(0, 0, name="dog"), at(30, 0, name="dog"), at(-40, 0)])
    assert not judged(two, [at(0, 0, name="dog"), at(-80, 0, name="dog"), at(-40, 0)])


class Fixed:
    """A detector that reads what is on an image off its first pixel."""

    names = frozenset(("cat", "dog"))

    def __call__(self, image):
        return [at(0, 0, name="cat")] if image[0, 0, 0] else []


def pictures(*shown):
    return torch.tensor(shown, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def test_tags_weigh_the_same_and_intervals_are_by_prompt():
    asked = [line("single_object", one("cat")), line("single_object", one("cat")), line("two_object", one("dog"))]
    score = GenEval(asked=asked, detector=Fixed(), colors=lambda image, objects: [])
    score.update(pictures(1, 1, 1), torch.tensor([0, 1, 2]))
    score.update(pictures(1, 0, 0), torch.tensor([0, 1, 2]))
    assert score.compute() == {
        "geneval": pytest.approx((0.75 + 0) / 2),
        "geneval_single_object": 0.75,
        "geneval_two_object": 0.0,
        "geneval_images": 0.5,
    }
    assert score.uncertainty() == {
        "geneval_single_object": pytest.approx(1.959964 * math.sqrt(2 * 0.25**2 / 2))
    }  # of prompts with 1 and 0.5
    score.reset()
    with pytest.raises(UserError, match=r"^scores\.geneval: no images"):
        score.compute()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"prompt": "a cat"}, " has no tag and include"),
        (line("x", {"count": 1}), "has no class"),
        (line("x", one("cat", 0)), "count=0 is no positive"),
        (line("x", one("cat", color="teal")), "color=teal is none of"),
        (line("x", one("unicorn")), "knows no 'unicorn'"),
        (line("x", one("cat", position=["above", 0])), "names no earlier object"),
        (line("x", one("cat", position="above")), "names no earlier object"),
    ],
)
def test_lines_that_are_none(asked, told):
    with pytest.raises(UserError, match=f"^suite\\.prompts: line 1.*{told}"):
        GenEval(asked=[asked], detector=Fixed(), colors=lambda image, objects: [])


def test_objects_are_cut_out_on_grey():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:4, 3:5] = True
    found = cut_out(image, Detection("cat", 1.0, (2.0, 2.0, 5.0, 4.0), mask))
    assert found.shape == (3, 2, 3)
    assert found[0].tolist() == [[0x99, 0, 0]] * 2
    assert cut_out(image, Detection("cat", 1.0, (-3.0, 7.9, 99.0, 99.0))).shape == (3, 1, 8)


def test_colours_are_read_by_clip(tmp_path, monkeypatch):
    encoder = CLIPEncoder(str(write_tiny_clip(tmp_path / "clip")))
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    objects = [Detection("cat", 1.0, (0, 0, 32, 32)), Detection("cat", 1.0, (8, 8, 40, 40))]
    features = encoder.images([image[:, :32, :32], image[:, 8:, 8:]])
    expected = []
    for feature in features:
        by_colour = []
        for colour in COLOURS:
            texts = [
                f"a photo of a {colour} cat",
                f"a photo of a {colour}-colored cat",
                f"a photo of a {colour} object",
            ]
            mean = encoder.texts(texts).mean(dim=0)
            by_colour.append(torch.cosine_similarity(feature, mean, dim=0).item())
        expected.append(COLOURS[max(range(len(COLOURS)), key=by_colour.__getitem__)])
    assert ColourReader(encoder)(image, objects) == expected
    assert ColourReader(encoder)(image, []) == []


def test_mask2former_gives_boxes_of_masks(tmp_path, monkeypatch):
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    swin = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
    )
    config.id2label = {0: "cat", 1: "mouse", 2: "sofa"}
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, do_resize=True, size_divisor=0).save_pretrained(
        tmp_path
    )
    detector = Mask2Former(str(tmp_path))
    assert detector.names == {"cat", "computer mouse", "couch"}
    assert all(it.score > 0.3 for it in detector(torch.zeros(3, 48, 40, dtype=torch.uint8)))

    def said(pixel_values):
        """The first query is a mouse in the upper left quarter, the others are nothing."""
        classes, masks = torch.full((1, 5, 4), -20.0), torch.full((1, 5, 16, 16), -20.0)
        classes[0, :, 3] = 20.0
        classes[0, 0] = torch.tensor([-20.0, 20.0, -20.0, -20.0])
        masks[0, 0, :8, :8] = 20.0
        return type("Said", (), {"class_queries_logits": classes, "masks_queries_logits": masks})()

    monkeypatch.setattr(detector.network, "forward", said)
    (mouse,) = detector(torch.zeros(3, 48, 40, dtype=torch.uint8))
    assert (mouse.name, mouse.box) == ("computer mouse", (0.0, 0.0, 20.0, 24.0))
    assert mouse.score > 0.99
    assert mouse.mask.shape == (48, 40)
    assert mouse.mask.sum() == 20 * 24
    with pytest.raises(UserError, match=r"^scores\.geneval\.detector: no folder /nowhere"):
        geneval.Mask2Former("/nowhere")
