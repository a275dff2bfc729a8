"""Folders of shards: written by two ranks, read by any; hostile and broken ones end in one line."""

import io
import os
import pickle
import shutil

import commands
import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, empty

from grn.checkpoints.consolidate import consolidate
from grn.checkpoints.sharded import read_sharded, verify, write_sharded
from grn.runtime.errors import UserError
from grn.weights.kinds import is_sharded_checkpoint
from grn.weights.reading import check_plain


def whole(generation=0):
    """A checkpoint as a single file has it; five rows do not divide over two ranks, and one is less than they are."""
    values = torch.arange(15.0).view(5, 3) + generation
    return {
        "state_dict": {"a.weight": values, "b.bias": values[0, :1].clone()},
        "ema": {"0.9": {"a.weight": values.double()}},
        "optimizer_states": [
            {"state": {0: {"exp_avg": -values, "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
        ],
        "global_step": 3 + generation,
        "betas": (0.9, 0.95),
    }


def sharded(node, mesh):
    if isinstance(node, torch.Tensor) and node.ndim:
        return distribute_tensor(node, mesh, [Shard(0)])
    if isinstance(node, dict):
        return {key: sharded(value, mesh) for key, value in node.items()}
    return [sharded(value, mesh) for value in node] if isinstance(node, list) else node


def write(rank, ranks, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet_{ranks}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    if ranks == 2:
        torch.save(whole(), folder / "over_a_file") if rank == 0 else None
        dist.barrier()
        write_sharded(sharded(whole(), mesh), folder / "first")
        for generation in range(2):
            write_sharded(sharded(whole(generation), mesh), folder / "twice")
        write_sharded(sharded(whole(), mesh), folder / "over_a_file")
        for generation in range(3):
            write_sharded(sharded(whole(generation), mesh), folder / "last.ckpt")
    placed = {"device_mesh": mesh, "placements": [Shard(0)]}
    read = read_sharded(folder / "first", "x", empty=lambda shape, dtype: empty(shape, dtype=dtype, **placed))
    weight = read["state_dict"]["a.weight"]
    assert isinstance(weight, DTensor)
    assert len(weight.to_local()) == (5 if ranks == 1 else 3 - rank)
    assert torch.equal(weight.full_tensor(), whole()["state_dict"]["a.weight"])
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for ranks in (2, 1):  # one rank reads what two wrote
        commands.spawn(write, (ranks, folder), nprocs=ranks)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder / "first", tmp_path / "copy")


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["first", "over_a_file"])
def test_one_process_reads_it_as_a_single_file(folder, name):
    assert is_sharded_checkpoint(folder / name)
    read = read_sharded(folder / name, "x")
    assert read["betas"] == (0.9, 0.95)
    assert_equal(read["optimizer_states"][0].pop("param_groups"), [{"lr": 0.1}])
    expected = whole()
    expected["optimizer_states"][0].pop("param_groups")
    assert_equal({k: v for k, v in read.items() if k != "betas"}, {k: v for k, v in expected.items() if k != "betas"})


def test_what_is_written_again_is_replaced(folder):
    read = read_sharded(folder / "twice", "x", skip=("optimizer_states",))
    assert read["global_step"] == 4
    assert "optimizer_states" not in read
    assert_equal(read["state_dict"], whole(1)["state_dict"])
    assert sorted(path.name for path in (folder / "twice").iterdir()) == ["000002", "rest.pt"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_last_keeps_the_one_before_it(folder):
    for name, generation in (("last.ckpt", 2), ("previous.ckpt", 1)):
        assert_equal(read_sharded(folder / name, "x")["state_dict"], whole(generation)["state_dict"])
        verify(folder / name, key="ckpt")
        assert len(list((folder / name).iterdir())) == 2
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["rest.pt", ".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_a_flipped_bit_is_found_wherever_it_is(folder, name, tmp_path):
    copy = shutil.copytree(folder / "last.ckpt", tmp_path / "last.ckpt")
    shutil.copytree(folder / "previous.ckpt", tmp_path / "previous.ckpt")
    (path,) = copy.rglob(name)
    data = path.read_bytes()
    places = range(0, len(data), max(1, len(data) // 40)) if name == ".metadata" else stored_numbers(data)
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(UserError, match=r"^ckpt_path: .*last\.ckpt is damaged .*: ckpt_path=previous$") as told:
            verify(copy, key="ckpt_path")
        assert "\n" not in str(told.value)
    with pytest.raises(UserError, match=r"^ckpt: .*last\.ckpt is damaged "):  # else the file would look sound
        consolidate(OmegaConf.create({"ckpt": str(copy), "out": str(tmp_path / "whole.ckpt")}))
    assert not (tmp_path / "whole.ckpt").exists()
    path.write_bytes(data)
    verify(copy, key="ckpt_path")
    path.unlink()
    if name != "rest.pt":
        with pytest.raises(UserError, match="is damaged"):
            verify(copy, key="ckpt_path")
    shares = [damaged(copy, share=(number, 2)) for number in range(2)]
    assert shares == {"__0_0.distcp": [True, False], "__1_0.distcp": [False, True]}.get(name, [True, True])


def damaged(path, **options):
    try:
        verify(path, key="ckpt", **options)
    except UserError:
        return True
    return False


def stored_numbers(data):
    """Where bytes of float32 1.0 to 14.0 stand."""
    found = [data.find(number.tobytes()) for number in torch.arange(1, 15, dtype=torch.float32).numpy()]
    return [place for place in found if place >= 0] or [len(data) // 2]


def test_broken_off_in_the_middle_the_earlier_one_stays(copy):
    shutil.copytree(copy / "000001", copy / "000002")
    (copy / "000002" / "__0_0.distcp").write_bytes(b"half")
    assert_equal(read_sharded(copy, "x")["state_dict"], whole()["state_dict"])


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/grn-was-here",)


@pytest.mark.parametrize("change", ["cut", "gone", "call", "reach", "huge", "shape", "rest"])
def test_hostile_and_broken_folders_take_one_line(copy, change):
    index = copy / "000001" / ".metadata"
    if change == "cut":
        shard = copy / "000001" / "__0_0.distcp"
        shard.write_bytes(shard.read_bytes()[:100])
    elif change == "gone":
        (copy / "000001" / "__1_0.distcp").unlink()
    elif change == "call":
        index.write_bytes(pickle.dumps(Evil()))
    elif change == "rest":
        torch.save({"checkpoint": Evil(), "shards": "000001"}, copy / "rest.pt")
    elif change == "shape":
        rest = torch.load(copy / "rest.pt", weights_only=True)
        rest["checkpoint"]["state_dict"]["a.weight"]["__sharded__"][1] = [6, 3]
        torch.save(rest, copy / "rest.pt")
    else:
        metadata = pickle.load(io.BytesIO(index.read_bytes()))
        if change == "reach":
            next(iter(metadata.storage_data.values())).relative_path = "../../elsewhere"
        else:
            metadata.state_dict_metadata["state_dict/a.weight"].size = torch.Size([2**40, 3])
        index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"^ckpt: x cannot be read \(.+\)$"):
        read_sharded(copy, "ckpt: x cannot be read")
    assert not os.path.exists("/tmp/grn-was-here")


@pytest.mark.timeout(60)
def test_containers_that_a_hostile_folder_shares_are_walked_once(copy):
    """Thirty levels of pairs: a billion values, in a kilobyte."""
    node = ["x"]
    for _ in range(30):
        node = [node, node]
    rest = torch.load(copy / "rest.pt", weights_only=True)
    rest["checkpoint"]["config"] = {"odd": node}
    torch.save(rest, copy / "rest.pt")
    with pytest.raises(UserError, match=r"is more than|holds more than"):
        check_plain(read_sharded(copy, "x")["config"], "x")
