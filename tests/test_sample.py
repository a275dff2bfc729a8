import json

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from test_generation import GUIDED, tiny_module

from grn import pictures
from grn import sample as command
from grn.cli import CONF
from grn.sampler import Linear, Sampler


def test_samples_are_written_in_their_order(tmp_path, monkeypatch):
    """Whatever the order in which they are done."""
    monkeypatch.setattr(command, "load_refiner", lambda *_, **__: (tiny_module(GUIDED), {}))
    reports = []
    for batch_size in (12, 5):
        out = tmp_path / str(batch_size)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            overrides = ["ckpt=x", "num=12", "device=cpu", "images=true", f"batch_size={batch_size}", f"out={out}"]
            command.sample(compose("sample", overrides))
        reports.append(json.loads((out / "samples.json").read_text()) | {"seconds": 0})
    assert reports[0] == reports[1]
    assert reports[0]["steps"] != sorted(reports[0]["steps"])
    for steps, trace, last, decision in zip(
        *(reports[0][key] for key in ("steps", "entropy_trace", "entropy", "entropy_at_decision"))
    ):
        assert (len(trace), trace[-1], trace[GUIDED.schedule.warmup]) == (steps, last, decision)
    for name in ("samples.png", "sorted.png", *(f"images/{i:05d}-{i % 5}.png" for i in range(12))):
        assert (tmp_path / "12" / name).read_bytes() == (tmp_path / "5" / name).read_bytes()


@pytest.mark.parametrize("sampler", [GUIDED, Sampler(Linear(3))], ids=["entropy", "linear"])
def test_samples_are_sorted_by_entropy_and_states_stand_beside_the_film(tmp_path, monkeypatch, sampler):
    monkeypatch.setattr(command, "load_refiner", lambda *_, **__: (tiny_module(sampler), {}))
    given = {}
    monkeypatch.setattr(
        pictures,
        "sorted_grid",
        lambda images, difficulty, steps, columns: (
            given.update(difficulty=difficulty.tolist(), steps=steps.tolist()) or pictures.grid(images, columns)
        ),
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        command.sample(compose("sample", ["ckpt=x", "num=12", "device=cpu", "film_states=true", f"out={tmp_path}"]))
    report = json.loads((tmp_path / "samples.json").read_text())
    expected = report["entropy_at_decision"]
    if sampler is not GUIDED:  # the entropy of whose first step says little
        expected = [sum(trace) / len(trace) for trace in report["entropy_trace"]]
    assert given == {"difficulty": pytest.approx(expected, abs=2e-5), "steps": report["steps"]}
    film = Image.open(tmp_path / "refinement.gif")
    assert film.n_frames == max(report["steps"])
    assert film.size == tuple(pictures.scale_for(16) * n for n in (5 * (2 * 16 + 2) + 2, 3 * (16 + 2) + 2))
