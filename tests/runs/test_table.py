"""What `grn ls` prints."""

import json
import time

import pytest
from PIL import Image
from test_listing import make_run

from grn.runs.listing import read_run
from grn.runs.table import as_plain, row_of, show_runs
from grn.runtime.errors import UserError


@pytest.fixture
def runs(tmp_path):
    make_run(tmp_path / "runs" / "old", at=time.time() - 7300, scores={"val/loss": 0.25, "eval/fid": float("nan")})
    folder = make_run(tmp_path / "runs" / "new", scores={"fid": 12.5, "fid_samples": 100, "val/loss": 0.5})
    (folder / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "pictures" / "grid-step0000100.png")
    return tmp_path / "runs"


def test_a_row_says_what_a_run_is(runs):
    name, kind, step, scores, written, picture = row_of(read_run(runs / "new"))
    assert (name, kind, step, picture) == ("new", "refiner", "100", "pictures/grid-step0000100.png")
    assert scores == "fid 12.5000 of 100 samples, val/loss 0.5000"
    assert written.endswith("s ago")
    assert row_of(read_run(runs / "old"))[3:] == ("val/loss 0.2500", "2 h ago", "")


def test_runs_are_printed_the_newest_first(runs, capsys):
    show_runs(str(runs), as_json=True)
    new, old = json.loads(capsys.readouterr().out)
    assert (new["run"], old["run"]) == ("new", "old")
    assert old["scores"] == {"val/loss": 0.25}
    assert new == as_plain(read_run(runs / "new"))
    show_runs(str(runs), as_json=False)
    printed = capsys.readouterr().out
    assert printed.index("new") < printed.index("old")


def test_what_is_damaged_is_said_and_what_is_not_there_is_a_mistake(runs, capsys, tmp_path):
    (runs / "new" / "metrics.json").write_text("[")
    show_runs(str(runs), as_json=False)
    assert "metrics.json is damaged" in capsys.readouterr().out.replace("\n", "")
    (tmp_path / "empty").mkdir()
    show_runs(str(tmp_path / "empty"), as_json=False)
    assert "no runs in" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^folder=nowhere: there is no such folder"):
        show_runs("nowhere", as_json=False)
