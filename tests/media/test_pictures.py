import base64
import io
import json
import math
import re

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from grn.media import pictures
from grn.method.sampler import Step
from grn.sampling import films
from grn.sampling.player import save_page
from grn.sampling.recording import Recording


def test_grid_is_row_by_row_and_scaled():
    images = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    images[4, 0] = 255
    picture = pictures.grid(images, columns=3, scale=2)
    assert picture.size == (2 * (3 * 6 + 2), 2 * (2 * 6 + 2))
    assert picture.getpixel((2 * (2 + 6 + 1), 2 * (2 + 6 + 1))) == (255, 0, 0)


@pytest.mark.parametrize(
    ("caption", "lines", "line"),
    [
        ("7", 1, pictures.CAPTION),
        ("a blue dotted critter with horns", 2, pictures.CAPTION),
        ("a long prompt " * 4, 4, pictures.CAPTION),
        ("a long prompt " * 5, 4, 11),
        ("a long prompt " * 30, 4, 11),
        ("x" * 30, 2, pictures.CAPTION),
    ],
)
def test_captions_stand_below_in_lines(caption, lines, line):
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    captioned, short = (pictures.grid(images, 2, 3, texts) for texts in (["7", caption, ""], ["7", "", ""]))
    width, height = 2 + 32 * 3, 2 + 32 * 3
    assert captioned.size == (2 * width + 2, 2 * (height + lines * line) + 2)
    corner = (width, 0, 2 * width + 2, height + lines * line)
    plain = Image.new("RGB", captioned.size, pictures.GROUND)
    plain.paste(short.crop((width, 0, 2 * width + 2, height)), (width, 0))
    left, top, right, bottom = ImageChops.difference(plain.crop(corner), captioned.crop(corner)).getbbox()
    assert top >= height
    assert height + (lines - 1) * line < bottom <= height + lines * line + 2
    assert 0 < left < right <= width


def test_captions_keep_their_words():
    texts, *_ = pictures._set(["a blue dotted critter with horns", "", "x" * 60], 62)
    assert " ".join(texts[0]) == "a blue dotted critter with horns"
    assert texts[1] == [""]
    assert texts[2][-1] != ""
    (text,), *_ = pictures._set(["a long prompt " * 30], 62)
    assert text[-1].endswith("…")


def test_clips_stand_side_by_side_in_an_mp4(tmp_path):
    colours = torch.tensor([[250, 10, 10], [10, 250, 10], [10, 10, 250]], dtype=torch.uint8)
    frames = [colours.roll(number, 0)[:, :, None, None].expand(-1, -1, 32, 32) for number in range(4)]
    path = pictures.save_clips(iter(frames), tmp_path / "clips.mp4", fps=8)
    with av.open(str(path)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    assert len(shown) == 4
    for number, (picture, frame) in enumerate(zip(shown, frames)):
        expected = np.asarray(pictures.grid(frame, scale=3))
        assert picture.shape == expected.shape
        for row, column in ((54, 54), (54, 156), (156, 54)):  # within the clips
            assert abs(picture[row, column].astype(int) - expected[row, column]).max() < 24, number


def test_film_has_every_frame_and_is_whole_or_absent(tmp_path):
    frames = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(5)]
    path = pictures.save_film(frames, tmp_path / "deep" / "film.gif", seconds=1)
    film = Image.open(path)
    assert film.n_frames == 5
    assert film.info["loop"] == 0
    assert list(path.parent.iterdir()) == [path]


def test_films_keep_few_colours_and_come_near_to_many(tmp_path):
    rows, columns = np.mgrid[:128, :128] * 2
    grey, many = (np.stack(bands, axis=-1).astype(np.uint8) for bands in ([rows] * 3, [rows, columns, rows[::-1]]))
    for picture, most in ((grey, 0), (many, 6)):
        path = pictures.save_film([Image.fromarray(picture)] * 2, tmp_path / "film.gif")
        shown = np.asarray(Image.open(path).convert("RGB")).astype(float)
        assert np.sqrt(((shown - picture) ** 2).mean()) <= most


def step(index, rows, predicted, tokens, kept, shape=(1, 1, 2)):
    ones = torch.ones(len(rows))
    tokens, predicted, kept = (
        torch.as_tensor(values).view(len(rows), -1, *shape) for values in (tokens, predicted, kept)
    )
    entropies = torch.full(tokens.shape, index + 0.5)
    t_next = torch.full((len(rows),), (index + 1) / 4, dtype=torch.float64)
    taken = torch.tensor([index] * len(rows))
    return Step(
        taken,
        torch.tensor(rows),
        ones,
        t_next,
        ones,
        tokens,
        predicted,
        kept,
        torch.zeros_like(kept, dtype=torch.bool),
        entropies,
    )


def gray(tokens):
    """A frame of each latent, as bright as its first token; the last one is shown."""
    return [(10 * tokens[:, :1, frame]).to(torch.uint8).repeat(1, 3, 4, 4) for frame in range(tokens.shape[2])]


def test_finished_samples_stand_still_in_the_film():
    recording = Recording()
    for index, rows in enumerate(([0, 1, 2], [1, 2], [2])):
        predicted = torch.full((len(rows), 1, 1, 2, 2), index)
        recording(step(index, rows, predicted, predicted, predicted.bool(), shape=(1, 2, 2)))
    assert [moment.predicted[:, 0, 0, 0, 0].tolist() for moment in recording.moments] == [[0] * 3, [0, 1, 1], [0, 1, 2]]
    assert [moment.taken.tolist() for moment in recording.moments] == [[1, 1, 1], [1, 2, 2], [1, 2, 3]]
    assert recording.moments[2].t.tolist() == [0.25, 0.5, 0.75]
    assert recording.moments[2].uncertainty[:, 0, 0, 0].tolist() == [0.5, 1.5, 2.5]


def test_a_film_begins_with_noise_and_says_how_far_it_is():
    recording = Recording()
    for index in range(3):
        predicted, tokens = torch.full((1, 1, 1, 2, 2), 10 + index), torch.full((1, 1, 1, 2, 2), 5)
        recording(step(index, [0], predicted, tokens, predicted > 0, shape=(1, 2, 2)))
    frames = films.film(recording, gray, states=False)
    assert [frame.getpixel((20, 20))[0] for frame in frames] == [50, 100, 110, 120]
    assert len({frame.size for frame in frames}) == 1
    bars = [[frame.getpixel((x, frame.height - 2)) == pictures.BAR for x in range(frame.width)] for frame in frames]
    assert [sum(bar) / len(bar) for bar in bars] == pytest.approx([0, 0.25, 0.5, 0.75], abs=0.02)
    wide = films.film(recording, gray)[1]
    assert wide.width > 1.8 * frames[0].width  # the states beside the prediction


def test_a_film_stays_small(tmp_path):
    generator = np.random.default_rng(0)
    frames = [Image.fromarray(generator.integers(0, 256, (100, 100, 3), dtype=np.uint8)) for _ in range(40)]
    path = pictures.save_film(frames, tmp_path / "film.gif", max_bytes=100_000)
    assert path.stat().st_size <= 100_000
    assert pictures.MAX_FILM_BYTES <= 1_000_000
    with Image.open(path) as film:
        assert film.n_frames >= 8


def test_states_say_what_becomes_of_each_token():
    """Two samples of two channels at two positions; the second sample is done after its first step."""
    filled, kept, erased, blank = range(4)
    recording = Recording()
    true, false = True, False
    recording(
        step(0, [0, 1], [[1, 1, 1, 1], [2, 2, 2, 2]], [[1, 0, 0, 0], [2, 0, 0, 0]], [[true, true, true, false]] * 2)
    )
    # Of sample 0: the same again, another one, none any more, none still.
    recording(step(1, [0], [[1, 3, 1, 1]], [[1, 1, 1, 0]], [[true, true, false, false]]))
    recording(step(2, [0], [[1, 3, 1, 1]], [[1, 3, 0, 0]], [[false, true, true, true]]))
    first = [filled, filled, filled, blank]  # noise that happens to be what is predicted is no prediction
    found = [moment.states.flatten(1).tolist() for moment in recording.moments]
    assert found[0] == [first, first]
    assert found[1] == [[kept, filled, erased, blank], first]
    assert found[2] == [[erased, kept, filled, filled], first]
    assert recording.moments[1].share("kept") == 1 / 8
    assert recording.moments[1].share("filled") == 4 / 8


@pytest.mark.parametrize("given", [0, 2])
def test_of_clips_the_first_latents_drawn_are_shown_and_no_others_kept(given):
    recording, whole = Recording(given=given), Recording(whole=True)
    latents = torch.arange(21).view(1, 1, 21, 1, 1).expand(2, 3, 21, 4, 4)
    for index in range(2):  # given are 0, 1, ..., predicted are 100, 101, ... and 200, 201, ...
        seen = step(
            index,
            [0, 1],
            (latents + 100 * index + 100).reshape(2, -1),
            latents.reshape(2, -1),
            torch.ones(2, 3 * 21 * 16, dtype=torch.bool),
            shape=(21, 4, 4),
        )
        recording(seen)
        whole(seen)
    for moment in recording.moments:
        assert moment.seen.shape == moment.predicted.shape == moment.states.shape == (2, 3, 1, 4, 4)
        assert moment.seen.dtype == moment.predicted.dtype == torch.uint8
    assert whole.moments[0].predicted.shape == (2, 3, 21, 4, 4)
    tokens = recording.with_prefix(recording.moments[1].predicted)
    assert tokens.dtype == torch.int64
    assert tokens[1, 2, :, 3, 3].tolist() == [*range(given), 200 + given]
    assert torch.equal(whole.with_prefix(whole.moments[1].predicted), latents + 200)


def test_positions_are_squares_of_their_tokens():
    states = torch.tensor([0, 1, 2]).view(1, 3, 1, 1, 1).repeat(1, 1, 1, 1, 2).to(torch.uint8)  # D = 3, two columns
    pixels = films.state_pixels(states, (4, 8))
    assert pixels.shape == (1, 3, 4, 8)
    seen = [[tuple(pixels[0, :, y, x].tolist()) for x in (0, 2, 4, 6)] for y in (0, 2)]
    a, b, c, _ = pictures.STATE_COLOURS
    assert seen == [[a, b] * 2, [c, pictures.GROUND] * 2]
    assert films.state_pixels(states, (5, 7)).shape == (1, 3, 5, 7)


def test_the_sorted_grid_goes_from_easy_to_difficult(monkeypatch):
    images = torch.zeros(6, 3, 48, 48, dtype=torch.uint8)
    images[:, 0] = (10 * torch.arange(6, dtype=torch.uint8)).view(6, 1, 1)
    difficulty, steps = torch.tensor([0.3, 0.1, 0.5, 0.2, 0.6, 0.4]), torch.arange(6)
    width, height = 2 * 48 + 2, 2 * 48 + 2 + pictures.CAPTION

    def shown(picture, count):
        return [picture.getpixel((10 + i % 3 * width, 10 + i // 3 * height))[0] // 10 for i in range(count)]

    picture = pictures.sorted_grid(images, difficulty, steps, columns=3)
    assert picture.size == (3 * width + 2, 2 * height + 2)
    assert shown(picture, 6) == [1, 3, 0, 5, 2, 4]
    other = pictures.sorted_grid(images, difficulty, steps + 10, columns=3)
    changed = ImageChops.difference(picture, other).crop((0, 0, picture.width, height)).getbbox()
    assert changed[1] >= height - pictures.CAPTION  # below the images alone
    monkeypatch.setattr(pictures, "SORTED", 3)
    assert shown(pictures.sorted_grid(images, difficulty, steps, columns=3), 3) == [1, 0, 4]


def test_the_steps_chart_has_a_bar_a_number():
    chart = pictures.steps_chart([0, 0, 4, 0, 2], [3.0, 1.5])

    def height(x, base):
        return sum(chart.getpixel((x, y)) == pictures.BAR for y in range(base - 145, base + 1))

    assert [height(x, 180) for x in (100, 320, 540)] == [141, 0, 71]  # two, three and four steps
    assert [height(x, 380) for x in (100, 500)] == [141, 71]


def test_curves_of_nothing_and_of_one_point_are_pictures():
    for curves in (
        {},
        {"a": []},
        {"a": [(1, math.nan)]},
        {"a": [(5, 2.0)]},
        {"a": [(1, 2.0)], "b": [(1, 2.0), (2, 2.0)]},
    ):
        assert pictures.curve_chart("fid", curves).width == 640


def test_large_samples_make_no_larger_film_or_page(tmp_path):
    recording, tokens = Recording(), torch.full((2, 1, 1, 2, 2), 5)
    recording(step(0, [0, 1], tokens, tokens, tokens > 0, shape=(1, 2, 2)))

    def decode(tokens):
        return [torch.zeros(2, 3, 900, 1200, dtype=torch.uint8)]

    assert pictures.step_grid(decode(tokens)[0], 2).size == (1600, 601)  # of 2406 x 904
    assert [picture.width for picture in films.film(recording, decode, columns=2)] == [1600, 1600]
    page = save_page(recording, decode, tmp_path / "page.html", title="", facts={}, columns=2).read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    _, _, content = data["steps"][0]["seen"].partition(",")
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (1600, 601)
