"""Absurd values and places of results end in one line, before anything large is made."""

import logging
import os
from types import SimpleNamespace

import pytest
import torch
from checkpoints import MODEL, contents, saved

from grn.checkpoints.native import load_tokenizer, read_checkpoint
from grn.cli.checks import check_links
from grn.method.sampler import Sampler
from grn.method.schedules import Linear
from grn.runs.folder import recorded_metrics
from grn.runtime.errors import UserError
from grn.runtime.files import write_folder
from grn.runtime.logs import LogFile
from grn.sampling.generation import best_device, check_memory
from grn.sampling.request import Request
from grn.sampling.sample import read_prompts


@pytest.mark.parametrize("name", ["foo", "cuda", "cuda:99", "meta", 3.5, "cpu:1", ""])
def test_devices_that_are_not_here(name, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(UserError, match=rf"^device={name}: this machine has "):
        best_device(name)
    assert best_device("cpu") == best_device(None) == torch.device("cpu")


def module(height, width):
    network = SimpleNamespace(classes=16)
    tokenizer = SimpleNamespace(stride=16)
    shape = (16, 1, height // 16, width // 16)
    return SimpleNamespace(
        network=network, tokenizer=tokenizer, device=torch.device("cpu"), shape_of=lambda request: shape
    )


def test_sizes_are_bounded_by_memory_with_the_arithmetic():
    request = Request(num=10, sampler=Sampler(Linear(50)))
    check_memory(module(256, 256), request, batch_size=10)
    for num in (10**12, 2**63):
        with pytest.raises(UserError, match=rf"^num={num}: samples of 264 bytes each take .* GiB, and"):
            check_memory(module(256, 256), Request(num=num, sampler=request.sampler), batch_size=10)
    each = 8 * 16 * 16 * 62500 * 62500
    with pytest.raises(UserError, match=rf"^height=1000000 width=1000000 .* 10 samples at a time, {each} bytes"):
        check_memory(module(10**6, 10**6), request, batch_size=10)


@pytest.mark.parametrize("prompts", [[None], ["a", True], [["a"]], []])
def test_what_is_no_prompt(prompts):
    with pytest.raises(UserError, match=r"^prompts="):
        read_prompts(prompts)


@pytest.mark.parametrize(
    "text", ["{", '{"step": 3}', '{"metrics": {"a": "x"}}', '{"metrics": [1]}', "[" * 10**5, "\xff"]
)
def test_half_a_report(text, tmp_path):
    (tmp_path / "metrics.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"metrics\.json is damaged"):
        recorded_metrics(tmp_path)


STATE = contents()["state_dict"]
FIRST = next(iter(STATE))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"global_step": "twelve"}, "its global_step is 'twelve'"),
        ({"global_step": True}, "its global_step is 'True'"),
        ({"global_step": -1}, "its global_step is '-1'"),
        ({"state_dict": ...}, "its state_dict does not hold named weights"),
        ({"state_dict": [1]}, "its state_dict does not hold named weights"),
        ({"state_dict": STATE | {FIRST: "x"}}, "its state_dict holds something else than weights"),
        ({"state_dict": STATE | {FIRST: STATE[FIRST].long()}}, "its state_dict holds something else than weights"),
        ({"state_dict": STATE | {FIRST: STATE[FIRST].to_sparse()}}, "its state_dict holds something else than weights"),
        ({"state_dict": {FIRST: STATE[FIRST]}, "ema": {}}, "is missing"),
        ({"ema": [1]}, "its ema does not hold averages by decay"),
        ({"ema": {0.99: {}}}, "its ema does not hold averages by decay"),
        ({"ema": {"0.99": 3}}, "its ema.0.99 does not hold named weights"),
        ({"tokenizer": 3}, "its tokenizer's record is not whole"),
        ({"tokenizer": {"model": MODEL}}, "its tokenizer's record is not whole"),
    ],
)
def test_half_a_checkpoint(changes, told, tmp_path):
    with pytest.raises(UserError) as error:
        load_tokenizer(saved(tmp_path, **changes))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [("blocks_per_stage", 10**9), ("dim", 10**9), ("multipliers", [1] * 5_000), ("dim", "x")]
)
def test_no_network_is_made_that_the_weights_are_not_of(key, value, tmp_path):
    config = contents()["config"]
    config["model"][key] = value
    with pytest.raises(UserError, match=r"describes no network|of another size"):
        load_tokenizer(saved(tmp_path, config=config))


def test_views_of_one_number_are_no_weights(tmp_path):
    """A file of a few kilobytes that claims 64 GB."""
    config, state = contents()["config"], contents()["state_dict"]
    state[FIRST] = torch.zeros(1).expand(2**17, 2**17)
    with pytest.raises(UserError, match=r"claims weights of .* bytes, and holds"):
        load_tokenizer(saved(tmp_path, config=config, state_dict=state), ema="none")


def nested(levels, width):
    node = ["x"] * width
    for _ in range(levels):
        node = [node] * width
    return node


CYCLE = []
CYCLE.append(CYCLE)
DEEP = []
for _ in range(150):
    DEEP = [DEEP]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("odd", [nested(10, 10), CYCLE, DEEP, ["x" * 2**20] * 64, float("inf"), 2**70, torch.zeros(1)])
@pytest.mark.parametrize("place", ["model", "callbacks"])
def test_configs_of_no_bounds_are_not_walked(place, odd, tmp_path):
    config = contents()["config"]
    config.setdefault(place, {})["odd"] = odd
    run = saved(tmp_path, config=config)
    for read in (read_checkpoint, lambda path: read_checkpoint(path, weights=False)):
        with pytest.raises(UserError, match=r"is not to be trusted: it (is more than|holds)"):
            read(run)


def test_a_log_is_not_appended_to_what_a_link_leads_to(tmp_path):
    victim, log = tmp_path / "victim", tmp_path / "run" / "sample.log"
    victim.write_text("mine\n")
    log.parent.mkdir()
    log.symlink_to(victim)
    for line in ("one", "two"):
        handler = LogFile(log)
        handler.emit(logging.makeLogRecord({"msg": line}))
        handler.close()
    assert victim.read_text() == "mine\n"
    assert log.read_text() == "one\ntwo\n"
    assert not log.is_symlink()


def test_results_do_not_follow_links_out_of_their_folder(tmp_path):
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.mkdir()
    (run / "samples").mkdir(parents=True)
    (run / "elsewhere").symlink_to(victim)
    check_links(run / "samples", given=False)
    check_links(run / "elsewhere", given=True)
    with pytest.raises(UserError, match=r"elsewhere is a link out of its folder, to .*; give another out=\.\.\."):
        check_links(run / "elsewhere", given=False)
    (run / "samples" / "videos").symlink_to(victim)
    for given in (False, True):
        with pytest.raises(UserError, match="videos is a link out of its folder"):
            check_links(run / "samples", given=given)


def test_a_folder_is_written_through_the_link_that_names_it(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for text in ("a", "b"):
        assert (
            write_folder(tmp_path / "link", lambda folder, text=text: (folder / "x").write_text(text))
            == tmp_path / "link"
        )
        assert os.readlink(tmp_path / "link") == str(tmp_path / "real")
        assert (tmp_path / "real" / "x").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
