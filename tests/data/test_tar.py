"""Archives against what tarfile reads of them, and archives that claim what they have not."""

import bz2
import gzip
import io
import lzma
import tarfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grn.data.stream.tar import MAX_HEADER_BYTES, TarReader


def archive(entries, format=tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def read(data, **arguments):
    """[(name, content)], and why it ended there."""
    found = []
    try:
        reader = TarReader(io.BytesIO(data), **arguments)
        for name, _ in reader:
            found.append((name, reader.read()))
    except tarfile.ReadError as error:
        return found, str(error)
    return found, None


def header(name, size, type=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, type
    return info.tobuf(format=tarfile.GNU_FORMAT)


def padded(data):
    return data + bytes(-len(data) % 512)


def pax(records, type=tarfile.XHDTYPE):
    return header("x", len(records), type) + padded(records)


GOOD = ("a.cls", b"7")
LONG = "f/" * 90 + "ä-\N{SNOWMAN}.txt"
ENTRIES = [GOOD, ("b.png", bytes(range(256)) * 9), (LONG, b""), ("l" * 200 + ".json", b"{}")]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_reads_what_tarfile_writes(format, compress):
    data = archive(ENTRIES, format)
    assert read(compress(data)) == (ENTRIES, None)
    assert read(compress(data), length=len(data)) == (ENTRIES, None)
    # `cat a.tar b.tar`, and pieces that were compressed one by one
    assert read(compress(data + data)) == (ENTRIES * 2, None)
    assert read(compress(data) + compress(data)) == (ENTRIES * 2, None)


def test_what_is_not_read_is_passed_over():
    reader = TarReader(io.BytesIO(archive(ENTRIES)))
    assert [(name, size) for name, size in reader] == [(name, len(content)) for name, content in ENTRIES]


def test_folders_and_links_are_no_files():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("d.cls")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    first = file.getvalue()[: 4 * 512]
    assert read(first + archive([GOOD])) == ([GOOD], None)


CLAIMS = {
    "of a file": header("b.cls", 2**62),
    "of a foreign file": header("b.xyz", 10**11),
    "below nothing": header("b.cls", -512),
    "of pax": pax(b"21 size=100000000000\n") + header("b.cls", 1),
    "of pax, below nothing": pax(b"11 size=-5\n") + header("b.cls", 1),
    "of pax, endless": pax(b"600012 size=" + b"9" * 600_000) + header("b.cls", 1),
    "of a pax header": header("x", 2**40, tarfile.XHDTYPE),
    "of a global header": header("x", 2**40, tarfile.XGLTYPE),
    "of a long name": header("x", 2**40, tarfile.GNUTYPE_LONGNAME),
    "of an unknown type": header("x", 2**50, b"Z"),
    "of a sparse file": header("b.cls", 2**50, tarfile.GNUTYPE_SPARSE),
    "of a sparse map": pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n") + header("b.cls", 1),
    "of digits alone": header("x", MAX_HEADER_BYTES, tarfile.XHDTYPE) + b"1" * MAX_HEADER_BYTES,
    "of nothing": header("x", 0, tarfile.XHDTYPE) * 3000,
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("compress", [None, gzip.compress])
def test_claims_of_more_than_there_is_end_the_archive_at_once(claim, compress):
    """tarfile needs 30 s for a hundred gigabytes that are not there, and years for 2^62 bytes."""
    data = archive([GOOD], tarfile.GNU_FORMAT)[:1024] + CLAIMS[claim] + bytes(4096)
    start = time.process_time()
    found, reason = read(compress(data)) if compress else read(data, length=len(data))
    assert time.process_time() - start < 2
    assert found == [GOOD]
    assert reason


def test_what_expands_without_end_is_left(monkeypatch):
    monkeypatch.setattr("grn.data.stream.tar.FREE_EXPANSION", 2**22)
    bomb = header("zeros.xyz", 2**24) + bytes(2**24) + archive([GOOD])
    for compress in (gzip.compress, bz2.compress, lzma.compress):
        found, reason = read(compress(bomb))
        assert found == []
        assert "expand to more than 100 times" in reason
    labels = archive([(f"{number:08d}.cls", b"%d" % (number % 1000)) for number in range(3000)], tarfile.GNU_FORMAT)
    assert read(gzip.compress(labels, 9))[1] is None


def test_the_check_is_asked_while_a_long_file_is_read():
    class Enough(Exception):
        pass

    asked = []

    def check():
        asked.append(1)
        if len(asked) > 3:
            raise Enough

    for data in (archive([("a.png", bytes(2**20))]), gzip.compress(archive([("a.png", bytes(2**20))]), 0)):
        asked.clear()
        with pytest.raises(Enough):
            list(TarReader(io.BytesIO(data), check=check))


def test_errors_of_the_stream_are_its_own():
    class Lost(io.RawIOBase):
        def read(self, size):
            raise ConnectionResetError("lost")

    with pytest.raises(ConnectionResetError):
        list(TarReader(Lost()))

    class LostLater(io.BytesIO):
        def read(self, size):
            if self.tell() > 0:
                raise ConnectionResetError("lost")
            return super().read(20)

    with pytest.raises(ConnectionResetError):
        list(TarReader(LostLater(gzip.compress(archive(ENTRIES), 0))))
    assert "compressed" in read(gzip.compress(archive(ENTRIES))[:-20])[1]


@pytest.mark.parametrize("magic", [b"\x1f\x8b", b"BZh", b"BZh9", b"\xfd7zXZ\0"])
def test_what_only_begins_as_compressed_files_do(magic):
    data = magic + archive([GOOD])[len(magic) :]
    found, error = read(data)
    assert not found
    assert "invalid compressed data" in error


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 4 * 512),
    st.binary(min_size=1, max_size=30),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_damage_gives_read_errors_alone(place, damage, format):
    data = bytearray(archive([(LONG, b"1"), GOOD], format))
    data[place : place + len(damage)] = damage
    start = time.process_time()
    read(bytes(data), length=len(data))
    read(bytes(data))
    assert time.process_time() - start < 2
