"""Shards on other machines: what is read, tried again, refused and named; by a server on this one that fails."""

import io
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tars import write_tar
from torch.utils.data import DataLoader

from grn.data.images import ImageShardsDataModule
from grn.data.prepare.shard_encoder import ShardEncoder
from grn.data.stream import remote
from grn.data.stream.streaming import MAX_ENTRY_BYTES, ShardStream, read_shard, resolve_urls
from grn.runtime.errors import UserError


class Server(ThreadingHTTPServer):
    """Serves files; `faults` are what befalls the next requests of a path, one after the other."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests = files, {}, []
        self.ranges = True

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        name = self.path.partition("?")[0].removeprefix("/")
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        fault = self.server.faults[name].pop(0) if self.server.faults.get(name) else None
        if name not in self.server.files:
            return self.send_error(404)
        if type(fault) is int and fault >= 400:
            return self.send_error(fault)
        if fault == "reset":
            return self.connection.close()
        data, start = self.server.files[name], 0
        if asked and self.server.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        data = data[start:]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            # aiohttp forgets what it has received and not yet given when a connection breaks off.
            time.sleep(0.5)
            return self.connection.close()
        return self.wfile.write(data)


def number(raw, _):
    return raw["__key__"]


@pytest.fixture
def shard(tmp_path):
    """Twenty samples, 100 kB each."""
    entries = [(f"{i:02d}.png", bytes([i]) * 100_000) for i in range(20)]
    return Path(write_tar(tmp_path / "s.tar", entries)).read_bytes()


@pytest.fixture
def server(shard, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server({"s.tar": shard, "t.tar": shard})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


KEYS = [f"{i:02d}" for i in range(20)]


def keys_of(*urls):
    stream = ShardStream(urls, number)
    return list(stream), stream.skipped()


@pytest.mark.parametrize("ranges", [True, False])
def test_what_fails_for_a_moment_is_tried_again(server, shard, ranges):
    server.ranges = ranges
    for faults in ([503], [500, 429, "reset"], ["cut"], ["cut", 502, "cut"], ["reset", "cut"]):
        server.faults["s.tar"], server.requests[:] = list(faults), []
        raws = list(read_shard(server.url("s.tar"), MAX_ENTRY_BYTES))
        assert [(raw["__key__"], raw["png"]) for raw in raws] == [
            (key, bytes([i]) * 100_000) for i, key in enumerate(KEYS)
        ]
        assert len(server.requests) == len(faults) + 1
    again = [asked for _, asked in server.requests if asked]
    assert again  # what has come already is not asked for again


def test_what_keeps_failing_is_named_and_counted(server, caplog):
    caplog.set_level(logging.WARNING)
    server.faults["s.tar"] = [503] * 50
    assert keys_of(server.url("s.tar"), server.url("t.tar")) == (KEYS, {"shard cannot be reached": 1})
    assert len([path for path, _ in server.requests if path == "/s.tar"]) == remote.ATTEMPTS
    assert f"rest of {server.url('s.tar')}: shard cannot be reached (the server answers 503)" in caplog.text


def test_what_has_come_before_a_lasting_fault_is_given(server):
    server.faults["s.tar"] = ["cut", *[503] * 50]
    keys, skipped = keys_of(server.url("s.tar"))
    assert keys == KEYS[: len(keys)]
    assert 0 < len(keys) < 12  # about half of twenty, less what was on its way
    assert skipped == {"shard cannot be reached": 1}


def test_a_server_that_breaks_off_again_and_again_is_left(server, monkeypatch):
    monkeypatch.setattr(remote, "MAX_FAULTS", 5)
    server.faults["s.tar"] = ["cut"] * 50
    keys, skipped = keys_of(server.url("s.tar"))
    assert keys == KEYS[: len(keys)]
    assert skipped == {"shard cannot be reached": 1}
    assert len(server.requests) == 6


@pytest.mark.parametrize(("fault", "said"), [(403, "the server answers 403"), (None, "there is no such file")])
def test_an_answer_is_not_asked_for_again(server, caplog, fault, said):
    name = "gone.tar" if fault is None else "s.tar"
    server.faults["s.tar"] = [fault] * 9
    assert keys_of(server.url(name)) == ([], {"shard cannot be reached": 1})
    assert len(server.requests) == 1
    assert said in caplog.text


def test_nobody_is_there(monkeypatch, caplog):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    assert keys_of("http://127.0.0.1:9/s.tar") == ([], {"shard cannot be reached": 1})
    assert "ClientConnectorError" in caplog.text


def test_signatures_go_out_as_they_are(server):
    signed = server.url("s.tar?X-Amz-Signature=a%2Fb%2Bc%3D%3D&x=1+2")
    assert keys_of(signed)[0] == KEYS
    assert server.requests[0][0] == "/s.tar?X-Amz-Signature=a%2Fb%2Bc%3D%3D&x=1+2"


def test_waiting_ends_with_the_run(server, monkeypatch):
    class Enough(Exception):
        pass

    def check():
        if server.requests:
            raise Enough

    monkeypatch.setattr(remote, "PAUSE", 1000)
    server.faults["s.tar"] = [503] * 9
    start = time.monotonic()
    with pytest.raises(Enough):
        list(read_shard(server.url("s.tar"), MAX_ENTRY_BYTES, check=check))
    assert time.monotonic() - start < 60


class Flaky(MemoryFileSystem):
    """A store of fsspec's whose reads fail every third time."""

    protocol = "flaky"
    calls = 0

    def open(self, path, *args, **kwargs):
        file = super().open(path.replace("flaky://", "memory://"), *args, **kwargs)

        def read(size=-1):
            Flaky.calls += 1
            if Flaky.calls % 3 == 1:
                raise TimeoutError("slow store")
            return io.BytesIO.read(file, min(size, 300_000))  # the store gives the same file again

        file.read = read
        return file


def test_stores_of_fsspec_are_read_and_tried_again(shard, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    with fsspec.open("memory://bucket/s.tar", "wb") as file:
        file.write(shard)
    assert keys_of("memory://bucket/s.tar") == (KEYS, {})
    assert keys_of("flaky://bucket/s.tar") == (KEYS, {})
    assert keys_of("memory://bucket/gone.tar") == ([], {"shard cannot be reached": 1})


def test_workers_read_them_after_the_main_process_has(server):
    assert keys_of(server.url("s.tar"))[0] == KEYS
    stream = ShardStream([server.url("s.tar"), server.url("t.tar")], number, num_workers=2)
    keys = [key for batch in DataLoader(stream, 5, num_workers=2, collate_fn=list, timeout=120) for key in batch]
    assert sorted(keys) == sorted(KEYS * 2)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "s9://bucket/a.tar",
            r"shards are not read from s9:// \(s9://bucket/a\.tar\): give paths, http\(s\)://, s3://",
        ),
        ("ais://bucket/a.tar", r"shards are not read from ais://"),
        ("PIPE://x", r"shards are not read from PIPE://"),
    ],
)
def test_schemes_that_are_not_read(url, said):
    with pytest.raises(UserError, match=rf"^data\.train: {said}") as told:
        resolve_urls(url, key="data.train", remedy="make them")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_packages_that_are_missing(monkeypatch, scheme, package):
    def missing(_):
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UserError, match=rf"^data\.train: {scheme}:// needs .* pip install {package} \({scheme}://b/"):
        resolve_urls(f"{scheme}://b/{{0..3}}.tar", key="data.train", remedy="make them")


def test_hf_is_known():
    assert resolve_urls("hf://datasets/a/b/{0..1}.tar", key="data.train", remedy="make them") == [
        "hf://datasets/a/b/0.tar",
        "hf://datasets/a/b/1.tar",
    ]


def test_it_is_told_at_the_start(server, tmp_path):
    val = write_tar(tmp_path / "h.tar", [])
    for url, said in (
        (
            server.url("gone.tar"),
            r"^data\.train: the shard http://.*/gone\.tar cannot be reached \(there is no such file",
        ),
        (server.url("*.tar"), r"wildcards are for local shards: use braces\)$"),
    ):
        data = ImageShardsDataModule(name="x", batch_size=1, image_size=8, train=url, val=val)
        with pytest.raises(UserError, match=said):
            data.setup()
    data = ImageShardsDataModule(name="x", batch_size=1, image_size=8, train=server.url("s.tar"), val=val)
    data.setup()


def test_encoding_stops_where_a_shard_cannot_be_reached(server):
    server.faults["s.tar"] = ["cut", *[503] * 50]
    encoder = ShardEncoder(tokenizer={}, decode=number, mirrored=False, batch_size=4)
    with pytest.raises(
        UserError, match=r"s\.tar cannot be read \(the server answers 503\): run the same command again"
    ):
        list(encoder._read(server.url("s.tar")))
