"""Points and tables of studies."""

import json
import math
import statistics

import pandas as pd
import pytest

from grn.runtime.errors import UserError
from grn.studies.results import Column, markdown, over_seeds, read_points, write_csv
from grn.studies.study import missing, run_study

MASKS = {"order": {"sampler": ("redraw", "mask")}}


def write(folder, **rows):
    for name, row in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(row))


@pytest.fixture
def points(tmp_path):
    """Of two samplers: three seeds of the one, a single one of the other."""
    values = {"1": 0.25, "2": 0.75, "3": 0.875}
    rows = {f"redraw-{seed}": {"sampler": "redraw", "steps": 8, "seed": seed, "fid": v} for seed, v in values.items()}
    write(tmp_path, mask={"sampler": "mask", "steps": 8, "seed": 1, "fid": 12.3456789, "more": True}, **rows)
    write(tmp_path, first={"sampler": "mask", "steps": 4, "seed": 1, "fid": math.nan})
    return read_points(tmp_path, ("steps", "sampler"), ("fid",), **MASKS)


def test_means_and_standard_errors_over_seeds(points):
    table = over_seeds(points, ("steps", "sampler"), ("fid",))
    assert list(table) == ["steps", "sampler", "seeds", "fid", "fid_error"]
    assert list(zip(table.steps, table.sampler, table.seeds)) == [(4, "mask", 1), (8, "redraw", 3), (8, "mask", 1)]
    values = [0.25, 0.75, 0.875]
    assert table.fid[1] == pytest.approx(statistics.mean(values))
    assert table.fid_error[1] == pytest.approx(statistics.stdev(values) / 3**0.5)
    assert table.fid[2] == 12.3456789
    assert table.fid_error.isna().tolist() == [True, False, True]


def test_a_seed_that_diverged_is_not_passed_over():
    points = pd.DataFrame({"kind": ["a", "a", "a", None], "fid": [1.0, math.nan, 3.0, 2.0]})
    table = over_seeds(points, ("kind",), ("fid",))
    assert table.seeds.tolist() == [3, 1]
    assert table.fid.isna().tolist() == [True, False]
    assert table.fid_error.isna().all()


def test_a_table_as_csv_and_as_markdown(points, tmp_path):
    table = over_seeds(points, ("steps", "sampler"), ("fid",))
    write_csv(table, tmp_path / "results.csv")
    lines = [b"steps,sampler,seeds,fid,fid_error", b"4,mask,1,nan,nan", b"8,redraw,3,0.625,0.19094"]
    assert (tmp_path / "results.csv").read_bytes() == b"\r\n".join([*lines, b"8,mask,1,12.346,nan", b""])
    columns = [Column("steps"), Column("sampler", "which"), Column("fid", scale=100, spec=".1f", unit=" %")]
    assert markdown(table, columns).splitlines() == [
        "| steps | which | fid |",
        "|---|---|---|",
        "| 4 | mask | - |",
        "| 8 | redraw | 62.5 ± 19.1 % |",
        "| 8 | mask | 1234.6 % |",
    ]


def test_every_digit_is_written_where_asked_for(tmp_path):
    write_csv(pd.DataFrame({"a": [1.0], "b": [0.1 + 0.2], "c": [3]}), tmp_path / "it.csv", float_format=None)
    assert (tmp_path / "it.csv").read_text().split() == ["a,b,c", "1.0,0.30000000000000004,3"]


WRONG = {
    "{": "it holds no JSON object",
    "[1]": "it holds no JSON object",
    '{"sampler": "mask", "steps": 1}': "it lacks fid",
    '{"sampler": "gan", "steps": 1, "fid": 1}': r"its sampler is gan, none of \['redraw', 'mask'\]",
}


@pytest.mark.parametrize(("content", "told"), WRONG.items(), ids=["no json", "a list", "no fid", "of another study"])
def test_what_is_no_point_is_named(tmp_path, content, told):
    (tmp_path / "it.json").write_text(content)
    with pytest.raises(UserError, match=rf"it\.json is no point of .*: {told}"):
        read_points(tmp_path, ("steps", "sampler"), ("fid",), **MASKS)


def test_a_folder_without_points_ends_a_study_in_one_line(tmp_path):
    write(tmp_path, other={"fid": 1})
    with pytest.raises(SystemExit) as ended:
        run_study(lambda: read_points(tmp_path, (), ("fid",), pattern="*-*.json"))
    assert (
        ended.value.code
        == f"error: {tmp_path} holds no points of this study (*-*.json): measure some, or give GRN_RUNS"
    )


def test_what_another_process_has_measured_meanwhile_is_skipped(tmp_path):
    write(tmp_path, b={})
    found = missing([*zip("abcd")], lambda name: tmp_path / f"{name}.json")
    assert next(found) == (("a",), tmp_path / "a.json")
    write(tmp_path, c={})
    assert [point for point, _ in found] == [("d",)]
