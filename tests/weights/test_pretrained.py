import copy
import functools
import inspect
import json
import re
import threading

import hub_server
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError
from grn.weights import pretrained
from grn.weights.kinds import is_pretrained
from grn.weights.pretrained import MAX_CONFIG_BYTES, Pretrained, fetch

SIZES = {"latent_channels": 3, "dim": 8, "decoder_dim": 4, "multipliers": (1, 2), "temporal": (True,), "rounds": 3}


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return HBQTokenizer(**SIZES, blocks_per_stage=1)


@pytest.fixture
def folder(tokenizer, tmp_path):
    return tokenizer.save_pretrained(tmp_path / "export", provenance={"step": 7})


def edit(folder, **changes):
    """Changes values of config.json; `...` takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return folder


def complaint(path, cls=HBQTokenizer, **options):
    with pytest.raises(UserError) as error:
        cls.from_pretrained(path, **options)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_there_and_back(tokenizer, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    again = HBQTokenizer.from_pretrained(str(folder))
    assert same(again, tokenizer)
    assert again.config == tokenizer.config
    assert (again.rounds, again.stride, again.temporal_stride, again.training) == (3, 4, 2, False)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in again.parameters())
    video = torch.rand(1, 3, 3, 8, 8)
    assert torch.equal(again(video)[0], tokenizer.eval()(video)[0])


def test_config_is_plain_and_complete(tokenizer, folder):
    expected = {**SIZES, "multipliers": [1, 2], "temporal": [True], "blocks_per_stage": 1, "dropout": 0.0}
    assert tokenizer.config == expected
    written = json.loads((folder / "config.json").read_text())
    assert {name: value for name, value in written.items() if name[0] != "_"} == expected
    assert (written["_class_name"], written["_provenance"]) == ("HBQTokenizer", {"step": 7})


class Mine(HBQTokenizer):
    """A class that passes on what it is given."""

    def __init__(self, **sizes):
        super().__init__(**sizes, dropout=0.5)


def test_what_is_passed_on_is_in_the_config(tmp_path):
    own = Mine(**SIZES).eval()
    assert own.config == {**SIZES, **{name: list(value) for name, value in SIZES.items() if isinstance(value, tuple)}}
    again = Mine.from_pretrained(own.save_pretrained(tmp_path / "own"))
    assert same(again, own)


def test_copies_know_their_config(tokenizer):
    assert copy.deepcopy(tokenizer).config == tokenizer.config


def test_loading_draws_no_random_numbers(folder):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    HBQTokenizer.from_pretrained(folder)
    assert torch.equal(torch.rand(3), expected)


def test_training_what_was_loaded_leaves_the_file_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    again = HBQTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


def test_dtype_and_device(tokenizer, folder, tmp_path):
    half = HBQTokenizer.from_pretrained(folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    again = HBQTokenizer.from_pretrained(half.save_pretrained(tmp_path / "half"))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert same(again, tokenizer.bfloat16().float())


def test_saving_is_deterministic_and_replaces_only_its_own(tokenizer, folder, tmp_path):
    other = tokenizer.save_pretrained(tmp_path / "new" / "other", provenance={"step": 7})
    for name in ("config.json", "model.safetensors"):
        assert (other / name).read_bytes() == (folder / name).read_bytes()
        assert (other / name).stat().st_mode == (folder / "config.json").stat().st_mode
    nn.init.zeros_(tokenizer.decoder.head.conv.bias)
    mapped = HBQTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert same(HBQTokenizer.from_pretrained(folder), tokenizer)
    assert not same(mapped, tokenizer)  # what was loaded earlier keeps its weights
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "new"]


def test_an_empty_folder_is_filled(tokenizer, tmp_path):
    assert same(HBQTokenizer.from_pretrained(tokenizer.save_pretrained(tmp_path)), tokenizer)


def test_a_foreign_folder_is_refused(tokenizer, folder, tmp_path):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"export holds other files \(notes\.txt\)"):
        tokenizer.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="not the config of a GRN network"):
        tokenizer.save_pretrained(tmp_path / "bert")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        tokenizer.save_pretrained(tmp_path / "file")


def test_a_save_that_fails_leaves_what_was_there(tokenizer, folder, monkeypatch):
    def full(*args, **options):
        raise OSError("no space left")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        tokenizer.save_pretrained(folder, provenance={"step": 8})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_what_is_no_export(folder, tmp_path):
    assert "no such folder" in complaint(tmp_path / "nowhere")
    assert "python -m grn.export ckpt=" in complaint(folder / "config.json")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in complaint(tmp_path / "empty")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has no model.safetensors (pickled weights are not read)" in complaint(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[" * 60_000, "cannot be read as JSON"),
        (b'{"dim": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b" " * (MAX_CONFIG_BYTES + 1), "not the config of a GRN network"),
        (b"[1]", "not the config of a GRN network"),
        (b'{"model_type": "bert"}', "not the config of a GRN network"),
    ],
    ids=["empty", "binary", "nested", "digits", "huge", "list", "foreign"],
)
def test_a_config_that_is_none(folder, text, expected):
    (folder / "config.json").write_bytes(text)
    assert expected in complaint(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"_class_name": "ClassRefiner"}, "is of a ClassRefiner, not of a HBQTokenizer"),
        ({"_class_name": ["x" * 10_000]}, "not of a HBQTokenizer"),
        ({"_format": 2}, "is of format 2, this GRN reads 1"),
        ({"_provenance": [1]}, "_provenance must be an object"),
        ({"depth": 3}, "has an unknown argument depth of HBQTokenizer"),
        ({"rounds": 4.5}, "model.rounds=4.5 must be a whole number, 1 to 8"),
        ({"rounds": "4"}, "model.rounds=4 must be a whole number, 1 to 8"),
        ({"dim": "wide"}, "model.dim=wide must be a whole number"),
        ({"dim": 10**6}, "is of another size than the model: .*; put back the config.json"),
        ({"dim": 10**9}, "describes no HBQTokenizer"),
        ({"dim": 10**60}, "describes no HBQTokenizer"),
        ({"latent_channels": 10**15}, "is of another size than the model|describes no HBQTokenizer"),
        ({"blocks_per_stage": 10**9}, "far more parameters than the file"),
        ({"multipliers": [1] * 5000, "temporal": [False] * 4999}, "far more parameters than the file"),
        ({"multipliers": {"a": [None]}}, "describes no HBQTokenizer"),
        ({"temporal": 3}, "describes no HBQTokenizer"),
        ({"dropout": "a\nb"}, "describes no HBQTokenizer"),
        ({"dim": 16}, "is of another size than the model: .* misfits in all"),
        ({"temporal": [False]}, r"is of another size than the model: .*time\.(weight|bias) is not a parameter"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit(folder, changes, expected):
    message = complaint(edit(folder, **changes))
    assert re.search(expected, message), message


def test_weights_that_do_not_fit(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    bias = state["decoder.head.conv.bias"]
    for broken, expected in (
        ({name: tensor for name, tensor in state.items() if tensor is not bias}, "decoder.head.conv.bias is missing"),
        (state | {"two\nlines": bias}, "a tensor with an impossible name"),
        (state | {"x" * 5000: bias}, "a tensor with an impossible name"),
        (state | {"more": bias}, "more is not a parameter of the model"),
        (state | {"decoder.head.conv.bias": bias[:2]}, "is (2,) in the file, (12,) in the model (1 misfits in all)"),
        (state | {"decoder.head.conv.bias": bias.to(torch.int8)}, "where weights are floats of 16 bits or more"),
    ):
        save_file({name: tensor.clone() for name, tensor in broken.items()}, path)
        assert expected in complaint(folder)


def test_damaged_weights(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", b"<html>404</html>", whole[:-1000], (1 << 60).to_bytes(8, "little") + whole[8:]):
        path.write_bytes(content)
        assert "cannot be read as safetensors" in complaint(folder)


def test_networks_made_in_other_threads_meanwhile_do_not_count(folder, monkeypatch):
    others = []

    def busy(self, *arguments, **options):
        thread = threading.Thread(target=lambda: others.extend(nn.Linear(1, 1) for _ in range(1000)))
        thread.start()
        thread.join()
        original(self, *arguments, **options)

    original = HBQTokenizer.__init__
    busy.__signature__ = inspect.signature(original)
    monkeypatch.setattr(HBQTokenizer, "__init__", busy)
    HBQTokenizer.from_pretrained(folder)
    assert len(others) >= 1000


class Table(Pretrained, nn.Module):
    """Required arguments, nested ones, and a buffer that is computed and not saved."""

    def __init__(self, width: int, *, options: dict):
        super().__init__()
        self.out = nn.Linear(width, 2)
        self.register_buffer("positions", torch.arange(width) * options["scales"][0], persistent=False)

    def forward(self, x):
        return self.out(x + self.positions)


def test_any_network_with_plain_arguments(tmp_path):
    table = Table(3, options={"scales": (2.0, 1)})
    assert copy.deepcopy(table).config == table.config == {"width": 3, "options": {"scales": [2.0, 1]}}
    again = Table.from_pretrained(table.save_pretrained(tmp_path / "table"))
    x = torch.rand(4, 3)
    assert torch.equal(again(x), table(x))
    edit(tmp_path / "table", options=...)
    assert "lacks argument options of Table" in complaint(tmp_path / "table", Table)
    table.save_pretrained(tmp_path / "table")
    assert "is of a Table, not of a HBQTokenizer" in complaint(tmp_path / "table")
    with pytest.raises(TypeError, match="hidden"):
        Table(3, hidden=4, options={})


def test_no_parameter_is_filled_twice(tmp_path, monkeypatch):
    """Where buffers are computed, the network is made again: without the memory and the time of its first weights."""
    folder = Table(3, options={"scales": (2.0, 1)}).save_pretrained(tmp_path / "table")
    filled = []
    original = nn.Linear.reset_parameters
    monkeypatch.setattr(
        nn.Linear, "reset_parameters", lambda self: (filled.append(self.weight.device.type), original(self))
    )
    again = Table.from_pretrained(folder)
    assert not any(parameter.is_meta for parameter in again.parameters())
    assert again.positions.tolist() == [0.0, 2.0, 4.0]
    assert filled == ["meta", "meta"]


def test_exports_of_before_an_optional_argument_came(folder):
    """It then has its default, which must stand for what was before."""
    assert HBQTokenizer.from_pretrained(edit(folder, dropout=...)).config["dropout"] == 0.0


def test_what_may_be_on_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_pretrained(folder)
    assert is_pretrained("export")
    assert is_pretrained("hf://owner/name-1.5")
    for path in ("owner/name", "runs/digits", "weights.ckpt", "/owner/name", "runs", ""):
        assert not is_pretrained(path), path
    (tmp_path / "runs").mkdir()
    for path in ("runs/digits", "/owner/name", "a/b/c", "../name", "owner/a--b", "hf://runs", "~/name"):
        with pytest.raises(UserError, match="no such folder"):
            fetch(path)


def test_without_the_internet():
    """tests/conftest.py keeps huggingface_hub offline."""
    message = complaint("grn-tests/nothing")
    assert message.startswith("grn-tests/nothing: not here, and the Hub cannot be reached (")
    assert message.endswith("; give a local folder")
    with pytest.raises(UserError, match=r"the Hub cannot be reached .* log in by `hf auth login`"):
        HBQTokenizer(**SIZES).push_to_hub("grn-tests/nothing")


@pytest.fixture
def hub(monkeypatch):
    """A hub of our own that serves, by `owner/name`, the folders put into the dict that it gives."""
    repositories = {}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with hub_server.serving(repositories, listed=["pytorch_model.bin"]) as (endpoint, _):
        local = functools.partial(huggingface_hub.snapshot_download, endpoint=endpoint)
        monkeypatch.setattr(pretrained, "snapshot_download", local)
        yield repositories


def test_from_the_hub(tokenizer, folder, hub, tmp_path):
    hub["grn-tests/tiny"] = folder
    again = HBQTokenizer.from_pretrained("grn-tests/tiny", cache_dir=tmp_path / "cache")
    assert same(again, tokenizer)
    cached = fetch("grn-tests/tiny", cache_dir=tmp_path / "cache", local_files_only=True)
    assert sorted(path.name for path in cached.iterdir()) == ["config.json", "model.safetensors"]
    message = complaint("grn-tests/other", cache_dir=tmp_path / "cache")
    assert (
        message == "grn-tests/other: not here, and no such repository, or not for you, on the Hub; give a local folder"
    )


def test_to_the_hub(tokenizer, monkeypatch):
    calls = {}

    class Recorder:
        def __init__(self, token):
            calls["token"] = token

        def create_repo(self, repo_id, **options):
            calls["create"] = (repo_id, options)

        def upload_folder(self, *, repo_id, folder_path, revision):
            calls["network"] = HBQTokenizer.from_pretrained(folder_path)
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})

    monkeypatch.setattr(pretrained, "HfApi", Recorder)
    url = tokenizer.push_to_hub("grn-tests/tiny", private=True, token="secret")
    assert url == "https://hub/grn-tests/tiny/commit/1"
    assert calls["create"] == ("grn-tests/tiny", {"private": True, "exist_ok": True})
    assert calls["token"] == "secret"
    assert same(calls["network"], tokenizer)
