import torch
from PIL import Image

from grn import pictures
from grn.sampler import Step


def test_grid_is_row_by_row_and_scaled():
    images = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    images[4, 0] = 255
    picture = pictures.grid(images, columns=3, scale=2)
    assert picture.size == (2 * (3 * 6 + 2), 2 * (2 * 6 + 2))
    assert picture.getpixel((2 * (2 + 6 + 1), 2 * (2 + 6 + 1))) == (255, 0, 0)


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
        return torch.zeros(len(tokens), 3, 1, 8, 8, dtype=torch.uint8)

    assert len(recorder.frames(decode)) == 3
    assert seen == [[0, 0, 0], [0, 1, 1], [0, 1, 2]]
