"""Anything at all in a checkpoint, a manifest or a tar header: one line or a value, in bounded time and memory."""

import json
import random
import resource
import tarfile
import time

import pytest
from checkpoints import contents, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grn.checkpoints.native import load_tokenizer
from grn.checkpoints.trust import GROUPS, check_group
from grn.data.manifest import read_manifest
from grn.data.stream.streaming import ShardStream
from grn.runtime.errors import UserError

SECONDS, MEBIBYTES = 30, 256  # of one example, on a busy machine
fuzzed = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

NAMES = sorted(
    {key for group in GROUPS.values() for key in group.parts} | {"_target_", "_partial_", "_args_", "weights"}
)
TARGETS = [
    *(target for group in GROUPS.values() for target in group.targets),
    "os.system",
    "grn.runtime.files.write_text",
    "",
    ".",
]
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from([*TARGETS, "${x}"])
)
NODES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=8)), inner, max_size=4),
    ),
    max_leaves=30,
)


class bounded:
    """Within it, nothing takes long or much memory, and nothing but a `UserError` is raised."""

    def __enter__(self):
        self.start, self.most = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __exit__(self, kind, error, _):
        assert time.perf_counter() - self.start < SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.most) / 1024 < MEBIBYTES
        if isinstance(error, UserError):
            assert "\n" not in str(error)
            assert len(str(error)) < 2000
            return True
        return False


@fuzzed
@given(group=st.sampled_from(sorted(GROUPS)), node=NODES)
def test_configs_of_a_group(group, node):
    with bounded():
        check_group(group, node, "x")


@fuzzed
@given(
    place=st.sampled_from([("model",), ("model", "dim"), ("model", "temporal"), ("training",), ("sampler",), ("x",)]),
    node=NODES,
)
def test_checkpoints(tmp_path_factory, place, node):
    config = contents()["config"]
    within = config
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = node
    run = saved(tmp_path_factory.mktemp("fuzz"), config=config)
    with bounded():
        load_tokenizer(run)


@fuzzed
@given(key=st.sampled_from(["config", "global_step", "ema", "ema_use", "state_dict", "tokenizer"]), node=NODES)
def test_what_stands_beside_the_config(tmp_path_factory, key, node):
    run = saved(tmp_path_factory.mktemp("fuzz"), **{key: node})
    with bounded():
        load_tokenizer(run)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=20,
)
MANIFEST = {
    "format": 1,
    "name": "x",
    "parameters": {},
    "num_labels": None,
    "label_names": None,
    "splits": {"train": {"samples": 1, "shards": [{"name": "train-000000.tar", "bytes": 1, "sha256": "x"}]}},
}


@fuzzed
@given(changes=st.dictionaries(st.sampled_from(sorted(MANIFEST)), JSON, max_size=3), cut=st.integers(0, 400))
def test_manifests(tmp_path_factory, changes, cut):
    root = tmp_path_factory.mktemp("fuzz")
    text = json.dumps(MANIFEST | changes)
    (root / "manifest.json").write_text(text if cut > 200 else text[: cut * 2])
    with bounded():
        read_manifest(root)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tar")
    with tarfile.open(folder / "sound.tar", "w") as tar:
        for number in range(3):
            (folder / "x").write_bytes(b"7" * 700)
            tar.add(folder / "x", f"{number}.cls")
    return (folder / "sound.tar").read_bytes()


@fuzzed
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 30), number=st.integers(0, 2**63 - 1))
def test_tar_headers(archive, tmp_path_factory, seed, flips, number):
    """Flipped bytes of headers, sizes that are claimed in base 256, and the rest cut off."""
    draws, data = random.Random(seed), bytearray(archive)
    header = draws.choice([0, 1536, 3072])
    for _ in range(flips):
        data[header + draws.randrange(512)] = draws.randrange(256)
    if draws.random() < 0.5:  # a sound header but for the size
        data = bytearray(archive)
        data[header + 124 : header + 136] = b"\x80" + number.to_bytes(11, "big")
        data[header + 148 : header + 156] = b" " * 8
        data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    path = tmp_path_factory.mktemp("fuzz") / "train-000000.tar"
    path.write_bytes(data[: draws.choice([len(data), draws.randrange(len(data))])])
    with bounded():
        stream = ShardStream([str(path)], lambda raw, number: raw, split_by_rank=False)
        assert len(list(stream)) <= 3
