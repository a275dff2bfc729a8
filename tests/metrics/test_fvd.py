"""FVD: the formula on features that are computed here again, whatever the batches and ranks; what is said of misuse."""

import json

import commands
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models import get_model

from grn.metrics.fvd import FrechetVideoDistance, clip_batches
from grn.metrics.video_networks import video_network
from grn.runtime.errors import UserError
from grn.runtime.files import sha256_of

WIDTH = 6


class Tiny(nn.Module):
    """Called as the field's I3D is; its features tell brightness, colours and motion."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = nn.Conv3d(3, width, (3, 3, 3), stride=(2, 4, 4))

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert not rescale
        assert resize
        assert return_features
        assert x.min() >= -1
        assert x.max() <= 1
        return self.layer(x).abs().mean(dim=(2, 3, 4)) * 10


@pytest.fixture(scope="module")
def i3d(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("i3d") / "tiny.pt"
    torch.jit.script(Tiny(WIDTH)).save(str(path))
    return path


def clips(number, seed, frames=12, low=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    shades = torch.randint(low, high, (number, 3, 1, 1, 1), generator=generator)
    noise = torch.randint(-40, 40, (number, 3, frames, 16, 24), generator=generator)
    return (shades + noise).clamp(0, 255).to(torch.uint8)


REAL, GENERATED = clips(40, 1), clips(30, 2, high=160)


def split(pixels, batch=7):
    return lambda: ({"pixels": some} for some in pixels.split(batch))


def make(path, *, real=REAL, **changes):
    arguments = {"train": split(real), "val": split(GENERATED), "network": lambda: video_network("i3d", str(path))}
    return FrechetVideoDistance(**(arguments | {"frames": 12} | changes))


def fvd(score, pixels, batch=100):
    score.reset()
    for some in pixels.split(batch):
        score.update(some)
    return score.compute()["fvd"]


def by_hand(path, real, generated):
    network = torch.jit.load(str(path))
    features = [
        network(x.float() / 127.5 - 1, rescale=False, resize=True, return_features=True).detach().double().numpy()
        for x in (real, generated)
    ]
    (mu, sigma), (other_mu, other_sigma) = ((x.mean(0), np.cov(x, rowvar=False)) for x in features)
    root = scipy.linalg.sqrtm(sigma @ other_sigma).real
    return np.sum((mu - other_mu) ** 2) + np.trace(sigma + other_sigma - 2 * root)


def test_it_is_the_formula_on_the_features(i3d):
    expected = by_hand(i3d, REAL, GENERATED)
    assert expected > 0.1
    assert fvd(make(i3d), GENERATED) == pytest.approx(expected, rel=1e-5)
    first = by_hand(i3d, REAL[:, :, :10], GENERATED[:, :, :10])
    assert fvd(make(i3d, frames=10), GENERATED) == pytest.approx(first, rel=1e-5)
    assert first != pytest.approx(expected, rel=1e-3)


def test_the_same_clips_are_at_no_distance_and_motion_counts(i3d):
    score = make(i3d)
    assert fvd(score, REAL) == pytest.approx(0, abs=1e-4)
    assert fvd(score, REAL[:, :, :1].expand(-1, -1, 12, -1, -1)) > 0.01  # still


def test_order_and_batches_do_not_matter(i3d):
    score = make(i3d)
    expected = fvd(score, GENERATED)
    for batch in (1, 7, 30):
        assert fvd(score, GENERATED.flip(0), batch) == pytest.approx(expected, rel=1e-6)


def test_splits_of_clips_of_all_sizes(i3d, caplog):
    """Lists, as data of packs has them; what is too short is left out, and told."""
    other = clips(5, 3, frames=15).transpose(3, 4)
    pixels = [*REAL[:20], clips(1, 4, frames=11)[0], *other, *REAL[20:], clips(1, 5, frames=1)[0]]
    lists = lambda: ({"pixels": pixels[i : i + 9]} for i in range(0, len(pixels), 9))  # noqa: E731
    shapes = [tuple(batch.shape[1:]) for batch in clip_batches(lists, 12, name="training")]
    assert set(shapes) == {(3, 12, 16, 24), (3, 12, 24, 16)}
    assert "2 of 47 clips are shorter than 12 frames: left out" in caplog.text
    found = fvd(make(i3d, train=lists), GENERATED)
    features = [torch.jit.load(str(i3d)).layer(x.float() / 127.5 - 1) for x in (REAL, other[:, :, :12])]
    features = torch.cat([x.abs().mean(dim=(2, 3, 4)) * 10 for x in features]).detach().double().numpy()
    reference = make(i3d, train=lists).reference
    np.testing.assert_allclose(reference["mu"], features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(reference["sigma"], np.cov(features, rowvar=False), rtol=1e-4, atol=1e-6)
    assert found > 0


def test_statistics_of_a_split_are_cached(i3d, tmp_path):
    first = fvd(make(i3d, cache_dir=tmp_path), GENERATED)
    (cached,) = tmp_path.iterdir()
    assert cached.name.startswith("fvd-statistics-")
    again = make(i3d, cache_dir=tmp_path, train=split(REAL, batch=11))
    again._features = None  # read from the cache, not computed
    assert again.reference["mu"].shape == (WIDTH,)
    assert fvd(make(i3d, cache_dir=tmp_path), GENERATED) == first
    for changes in ({"real": REAL[1:]}, {"frames": 10}, {"reference": "val"}):
        fvd(make(i3d, cache_dir=tmp_path, **changes), GENERATED)
    assert len(list(tmp_path.iterdir())) == 4
    assert fvd(make(i3d, reference=str(cached)), GENERATED) == pytest.approx(first, rel=1e-9)
    cached.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"scores\.fvd\.reference: .* is not a readable npz"):
        fvd(make(i3d, cache_dir=tmp_path), GENERATED)


def test_misuse_is_one_line(i3d):
    with pytest.raises(UserError, match=r"scores\.fvd\.frames=9: the network reads 10 or more"):
        make(i3d, frames=9)
    with pytest.raises(UserError, match=r"scores\.fvd\.frames=16, but clips have 12 frames: give fewer .* 10 or more"):
        make(i3d, frames=16).update(GENERATED)
    longer = clips(4, 6, frames=16)
    with pytest.raises(UserError, match=r"no clip of the training split has scores\.fvd\.frames=16 .* longest has 12"):
        make(i3d, frames=16).update(longer)
    with pytest.raises(UserError, match="no clip of the training split"):
        make(i3d, train=list).update(GENERATED)
    with pytest.raises(UserError, match=r"scores\.fvd\.reference: the training split needs at least 2"):
        make(i3d, real=REAL[:1]).update(GENERATED)
    with pytest.raises(UserError, match=r"scores\.fvd\.reference: no such file: nowhere\.npz"):
        make(i3d, reference="nowhere.npz").update(GENERATED)
    score = make(i3d)
    score.update(GENERATED[:1])
    with pytest.raises(UserError, match=r"scores\.fvd needs at least 2 clips, got 1"):
        score.compute()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": None}, r"path must be given: the local path of i3d_torchscript\.pt \(https://"),
        ({"path": "nowhere.pt"}, r"path: no file nowhere\.pt; give the local path of i3d_torchscript\.pt \(https://"),
        ({"name": "r3d_18", "path": None}, r"path must be given: .* r3d_18 \(https://.*r3d_18-.*\.pth\)"),
        ({"name": "i3d_inception"}, r"name=i3d_inception must be one of i3d, r3d_18, mc3_18, r2plus1d_18"),
        ({"sha256": "0" * 64}, r"sha256: .*tiny\.pt has [0-9a-f]{64}: it differs from "),
        ({"path": "text"}, r"path: .*text cannot be read as TorchScript"),
        ({"name": "mc3_18", "path": "text"}, r"path: .*text cannot be read: download it again"),
        ({"name": "mc3_18", "path": "list"}, r"path: .*list does not hold torchvision's mc3_18"),
        ({"name": "mc3_18", "path": "other"}, r"path: .*other does not hold torchvision's mc3_18"),
    ],
)
def test_networks_that_cannot_be_had(i3d, tmp_path, changes, said):
    (tmp_path / "text").write_text("no network")
    torch.save([1], tmp_path / "list")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other")
    if (path := changes.get("path")) in ("text", "list", "other"):
        changes = changes | {"path": str(tmp_path / path)}
    with pytest.raises(UserError, match=rf"^scores\.fvd\.network\.{said}") as error:
        video_network(**({"path": str(i3d)} | changes))
    assert "\n" not in str(error.value)


def test_torchscript_of_another_kind_is_told(tmp_path):
    torch.jit.script(nn.Conv3d(3, 2, 3)).save(str(tmp_path / "conv.pt"))
    with pytest.raises(UserError, match=r"scores\.fvd\.network: it makes no features .* is its file another network's"):
        make(tmp_path / "conv.pt")


def test_the_digest_may_be_given(i3d):
    network = video_network("i3d", str(i3d), sha256_of(i3d).upper())
    assert sha256_of(i3d) in network.identity
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.full
def test_torchvisions_networks(tmp_path):
    """Random weights, with other classes than torchvision's: the features before the last layer."""
    torch.manual_seed(1)
    whole = get_model("mc3_18", weights=None, num_classes=7).eval()
    torch.save(whole.state_dict(), tmp_path / "mc3.pth")
    network = video_network("mc3_18", str(tmp_path / "mc3.pth"))
    pixels = clips(3, 7, frames=4)
    features = network(pixels)
    assert features.shape == (3, 512)
    frames = nn.functional.interpolate(pixels.float().flatten(0, 1), size=(112, 112), mode="bilinear").unflatten(
        0, (3, 3)
    )
    mean, std = torch.tensor([0.43216, 0.394666, 0.37645]), torch.tensor([0.22803, 0.22145, 0.216989])
    normalised = (frames / 255 - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1)
    # The frames are rounded to eight bits once they are resized.
    assert (whole.fc(features) - whole(normalised)).abs().max() < 0.05 * whole(normalised).abs().max()
    score = make(None, real=pixels, network=lambda: network, frames=4)
    assert fvd(score, pixels.flip(0)) == pytest.approx(0, abs=1e-3)
    assert fvd(score, clips(3, 8, frames=4, high=60)) > 1e-3


def run_rank(rank, ranks, folder, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    try:
        score = make(path)
        found = [fvd(score, GENERATED[rank::ranks])]
        score.reset()
        if rank == 0:  # and the other has none at all
            score.update(GENERATED)
        found.append(score.compute()["fvd"])
        (folder / f"{rank}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_number_of_one(i3d, tmp_path):
    commands.spawn(run_rank, (2, tmp_path, i3d), nprocs=2)
    expected = fvd(make(i3d), GENERATED)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx([expected] * 2, rel=1e-6)
