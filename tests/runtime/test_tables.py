"""Tables that are no terminal's."""

from rich.table import Table

from grn.runtime.tables import show

PATH = "/a/folder/of/runs/" + "with a long name/" * 9


def table():
    table = Table("what", "path", title=f"{PATH}table.csv")
    table.add_row("run", PATH)
    return table


def test_paths_stay_in_one_piece_without_a_terminal(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    show(table())
    first, *_, last, _ = capsys.readouterr().out.splitlines()
    assert f"{PATH}table.csv" in first
    assert f" {PATH} " in last


def test_the_width_of_a_terminal_or_of_columns_counts(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    show(table())
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 70
