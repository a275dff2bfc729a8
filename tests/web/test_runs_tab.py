"""What the tab Runs says of runs; tests/browser shows it."""

import pytest

from grn.runs.listing import Run
from grn.web.runs_tab import SHOWN, ago, first_curves, steps_of


def run(step, max_steps, folder):
    return Run(folder, "run", "refiner", step, max_steps, None, None, {}, 0.0)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-5, "now"), (9, "now"), (59, "59 s ago"), (60, "1 min ago"), (7300, "2 h ago"), (1e6, "11 d ago")],
)
def test_times_are_told_in_the_largest_unit(seconds, told):
    assert ago(1000.0, now=1000.0 + seconds) == told


def test_steps_of_runs_that_have_none_and_of_those_without_end(tmp_path):
    assert steps_of(run(None, 100, tmp_path)) == "no step yet"
    assert steps_of(run(1200, 5000, tmp_path)) == "step 1,200 of 5,000"
    assert steps_of(run(7, None, tmp_path)) == "step 7"


def test_losses_come_before_other_curves_and_single_points_last():
    curve, point = [(0, 1.0), (1, 2.0)], [(0, 1.0)]
    assert first_curves({"a": curve, "eval/fid": point, "val/loss": curve, "train/loss": curve}) == [
        "train/loss",
        "val/loss",
    ]
    assert first_curves({"a": curve, "b": curve}) == ["a", "b"]
    assert first_curves({"eval/fid": point}) == ["eval/fid"]
    assert first_curves({}) == []
    assert len(first_curves({str(number): curve for number in range(50)})) == SHOWN
