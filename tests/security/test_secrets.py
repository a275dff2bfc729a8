"""What gives access to data is neither recorded nor logged."""

import logging

import pytest
from omegaconf import OmegaConf

from grn.data.stream.streaming import check_foreign_urls
from grn.runs.folder import record
from grn.runtime.errors import UserError
from grn.runtime.logs import Formatter
from grn.runtime.secrets import cut, cut_line, without_secrets

SECRETS = ("hunter2", "AKIA", "Xyz123", "eyJh")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("https://h/a-{000..009}.tar?X-Amz-Signature=AKIA&b=1", "https://h/a-{000..009}.tar?***"),
        ("https://me:hunter2@h/a.tar", "https://***@h/a.tar"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("hf://datasets/owner/name@main/a.tar", "hf://datasets/owner/name@main/a.tar"),
        ("/data/a?.tar", "/data/a?.tar"),
        (
            "pipe:curl -s -H 'Authorization: Bearer eyJh' https://h/a-{0..3}.tar?sig=AKIA",
            "pipe:curl *** https://h/a-{0..3}.tar?***",
        ),
        ("pipe:AWS_SECRET=AKIA aws s3 cp s3://b/a.tar -", "pipe:*** s3://b/a.tar ***"),
        ("data.train=pipe:curl -u me:hunter2 /x/a.tar", "data.train=pipe:curl *** /x/a.tar"),
        ("pipe:cat 'unclosed hunter2", "pipe:***"),
        ("a three left of an eight: token=5", "a three left of an eight: token=5"),
    ],
)
def test_values(value, expected):
    assert cut(value) == expected
    assert cut(expected) == expected
    assert not [secret for secret in SECRETS if secret in cut(value)]


def test_lines_and_containers():
    line = cut_line("rest of https://u:hunter2@h/x.tar?k=AKIA: HTTP 403 (Authorization: Bearer eyJh, api_key=Xyz123)")
    assert line == "rest of https://***@h/x.tar?*** HTTP 403 (Authorization: Bearer ***, api_key=***)"
    told = cut_line("ckpt=x has shards read by 'pipe:curl -u me:hunter2 https://h/b.tar': give another")
    assert told == "ckpt=x has shards read by 'pipe:curl *** https://h/b.tar': give another"
    assert cut_line(told) == told
    assert cut_line("data.train=pipe:curl -u me:hunter2 x: no shards") == "data.train=pipe:curl ***"
    config = {"data": {"train": ["https://h/a.tar?AKIA", 3, None]}, "prompts": ["what is https://h/?q=1"]}
    assert without_secrets(config) == config | {"data": {"train": ["https://h/a.tar?***", 3, None]}}
    told = logging.makeLogRecord({"msg": "reading %s", "args": ("https://h/a.tar?AKIA",)})
    assert Formatter("%(message)s").format(told) == "reading https://h/a.tar?***"


def test_a_run_folder_has_none(tmp_path, monkeypatch):
    urls = ["https://h/a.tar?X=AKIA", "pipe:curl -u me:hunter2 https://h/b.tar"]
    monkeypatch.setattr("sys.argv", ["grn.train", f"data.train=[{urls[0]}]", f"data.val={urls[1]}"])
    record(tmp_path, OmegaConf.create({"data": {"train": urls}, "again": "${data.train}"}))
    for path in tmp_path.iterdir():
        assert not [secret for secret in SECRETS if secret in path.read_text()]
    assert "https://h/a.tar?***" in (tmp_path / "config.yaml").read_text()
    assert "https://h/a.tar?***" in (tmp_path / "command.txt").read_text()


@pytest.mark.parametrize("url", ["https://h/a.tar?***", "pipe:curl *** https://h/b.tar"])
def test_what_was_cut_is_asked_for(url, monkeypatch):
    monkeypatch.setenv("GRN_TRUST", "pipe")
    with pytest.raises(UserError, match=r"^ckpt=x has .* were removed; give data\.train=\.\.\. here$"):
        check_foreign_urls("ckpt=x", {"data.train": [url], "data.val": None})
