import zipfile

import numpy as np
import pytest
import torch

from grn.evaluation.archive import SampleArchive, remove_parts
from grn.runtime.errors import UserError


def images(count):
    return torch.randint(0, 256, (count, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_holds_the_images_of_all_ranks_in_order(tmp_path, ranks):
    """Of nine ranks the last two have no image."""
    kept, labels = images(7), torch.arange(7) % 5
    archives = [SampleArchive(tmp_path / "out" / "samples.npz", rank=r, world_size=ranks) for r in range(ranks)]
    for rank, archive in reversed(list(enumerate(archives))):  # the first rank last: it waits for the others
        for ids in reversed(torch.arange(7)[rank::ranks].split(2)):  # samples are done in any order
            if len(ids):
                archive.add(kept[ids], ids)
        archive.save(labels)
    for archive in archives:
        archive.__exit__()
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "samples.npz"
    with np.load(path) as arrays:
        assert (arrays["arr_0"].dtype, arrays["arr_1"].dtype) == (np.uint8, np.int64)
        np.testing.assert_array_equal(arrays["arr_0"], kept.permute(0, 2, 3, 1).numpy())
        np.testing.assert_array_equal(arrays["arr_1"], labels.numpy())
    assert zipfile.ZipFile(path).infolist()[0].compress_type == zipfile.ZIP_STORED


def test_leaves_nothing_behind_where_sampling_fails(tmp_path):
    def fail(archive):
        with archive:
            archive.add(images(2), torch.arange(2))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(SampleArchive(tmp_path / "samples.npz"))
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_do_not_share_the_folder(tmp_path):
    with SampleArchive(tmp_path / "samples.npz", world_size=2) as archive:
        archive.add(images(2), torch.arange(2))
        with pytest.raises(UserError, match=r"all ranks must share the folder `out`.*\.samples\.npz\.1"):
            archive.save(torch.zeros(4, dtype=torch.int64))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    archive = SampleArchive(tmp_path / "file" / "samples.npz")
    with archive, pytest.raises(UserError, match="cannot be written"):
        archive.add(images(2), torch.arange(2))


def test_parts_of_killed_ranks_are_removed(tmp_path):
    for name in (".samples.npz.0", ".samples.npz.17", ".other.npz.0", "samples.npz"):
        (tmp_path / name).touch()
    remove_parts(tmp_path / "samples.npz")
    assert {path.name for path in tmp_path.iterdir()} == {".other.npz.0", "samples.npz"}
