import json

from hydra import compose, initialize_config_dir
from test_generation import GUIDED, tiny_module

from grn import sample as command
from grn.cli import CONF


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
    for name in ("samples.png", *(f"images/{i:05d}-{i % 5}.png" for i in range(12))):
        assert (tmp_path / "12" / name).read_bytes() == (tmp_path / "5" / name).read_bytes()
