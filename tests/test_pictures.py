import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from grn import pictures
from grn.sampler import Step


def test_grid_is_row_by_row_and_scaled():
    images = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    images[4, 0] = 255
    picture = pictures.grid(images, columns=3, scale=2)
    assert picture.size == (2 * (3 * 6 + 2), 2 * (2 * 6 + 2))
    assert picture.getpixel((2 * (2 + 6 + 1), 2 * (2 + 6 + 1))) == (255, 0, 0)


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


def test_finished_samples_stand_still_in_the_film():
    recorder = pictures.FilmRecorder()
    for index, rows in enumerate(([0, 1, 2], [1, 2], [2])):
        predicted = torch.full((len(rows), 1, 1, 2, 2), index)
        ones = torch.ones(len(rows))
        recorder(Step(index, torch.tensor(rows), ones, ones, ones, predicted, predicted, predicted.bool()))
    seen = []

    def decode(tokens):
        seen.append(tokens[:, 0, 0, 0, 0].tolist())
        return [torch.zeros(len(tokens), 3, 8, 8, dtype=torch.uint8)]

    assert len(recorder.frames(decode)) == 3
    assert seen == [[0, 0, 0], [0, 1, 1], [0, 1, 2]]


def step(index, rows, predicted, tokens, kept):
    ones = torch.ones(len(rows))
    shaped = [torch.tensor(values).view(len(rows), -1, 1, 1, 2) for values in (tokens, predicted, kept)]
    return Step(torch.tensor([index] * len(rows)), torch.tensor(rows), ones, ones, ones, *shaped)


def test_states_say_what_becomes_of_each_token():
    """Two samples of two channels at two positions; the second sample is done after its first step."""
    filled, kept, erased, blank = range(4)
    recorder = pictures.FilmRecorder(states=True)
    true, false = True, False
    recorder(
        step(0, [0, 1], [[1, 1, 1, 1], [2, 2, 2, 2]], [[1, 0, 0, 0], [2, 0, 0, 0]], [[true, true, true, false]] * 2)
    )
    # Of sample 0: the same again, another one, none any more, none still.
    recorder(step(1, [0], [[1, 3, 1, 1]], [[1, 1, 1, 0]], [[true, true, false, false]]))
    recorder(step(2, [0], [[1, 3, 1, 1]], [[1, 3, 0, 0]], [[false, true, true, true]]))
    first = [filled, filled, filled, blank]  # noise that happens to be what is predicted is no prediction
    found = [states.flatten(1).tolist() for states in recorder._states]
    assert found[0] == [first, first]
    assert found[1] == [[kept, filled, erased, blank], first]
    assert found[2] == [[erased, kept, filled, filled], first]

    images = recorder.frames(lambda tokens: [torch.zeros(len(tokens), 3, 4, 4, dtype=torch.uint8)], columns=1)
    assert len(images) == 3
    scale = pictures.scale_for(4)
    assert images[0].size == (scale * (8 + 4), scale * (2 * 6 + 2))  # the state beside the prediction


@pytest.mark.parametrize("given", [0, 2])
def test_of_clips_the_first_latents_drawn_are_shown_and_no_others_kept(given):
    recorder = pictures.FilmRecorder(states=True, given=given)
    latents = torch.arange(21).view(1, 1, 21, 1, 1).expand(2, 3, 21, 4, 4)
    ones = torch.ones(2)
    for index in range(2):  # given are 0, 1, ..., predicted are 100, 101, ... and 200, 201, ...
        predicted = latents + 100 * index + 100
        of_all = torch.full((2,), index), torch.arange(2), ones, ones, ones
        recorder(Step(*of_all, latents, predicted, torch.ones_like(latents, dtype=torch.bool)))
    held = sum(x.nbytes for x in (recorder._given, recorder._kept, *recorder._predictions, *recorder._states))
    assert held == (given + 1 + 2 * 2) * 2 * 3 * 4 * 4

    seen = []

    def decode(tokens):
        assert tokens.dtype == torch.int64
        seen.append(tokens[1, 2, :, 3, 3].tolist())
        yield from (torch.full((2, 3, 8, 8), level, dtype=torch.uint8) for level in (50, 250))

    images = recorder.frames(decode)
    assert seen == [[*range(given), 100 + given], [*range(given), 200 + given]]
    assert images[0].getpixel((30, 30)) == (250, 250, 250)


def test_positions_are_squares_of_their_tokens():
    states = torch.tensor([0, 1, 2]).view(1, 3, 1, 1, 1).repeat(1, 1, 1, 1, 2).to(torch.uint8)  # D = 3, two columns
    pixels = pictures.state_pixels(states, (4, 8))
    assert pixels.shape == (1, 3, 4, 8)
    seen = [[tuple(pixels[0, :, y, x].tolist()) for x in (0, 2, 4, 6)] for y in (0, 2)]
    a, b, c, _ = pictures.STATE_COLOURS
    assert seen == [[a, b] * 2, [c, pictures.GROUND] * 2]
    assert pictures.state_pixels(states, (5, 7)).shape == (1, 3, 5, 7)


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
