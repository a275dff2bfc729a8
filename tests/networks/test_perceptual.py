import pytest
import torch
from torchvision.models import VGG16_Weights, vgg16

from grn.networks.perceptual import LPIPS
from grn.runtime.errors import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{k}": v for k, v in vgg16(weights=None).features.state_dict().items()}, path)
    return path


def test_distance_grows_with_the_difference_and_has_a_gradient(weights):
    lpips = LPIPS(str(weights))
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    noise = torch.randn_like(image)
    assert lpips(image, image).item() == pytest.approx(0, abs=1e-6)
    near = (image + 0.05 * noise).requires_grad_()
    distance = lpips(near, image)
    distance.backward()
    assert near.grad.abs().max() > 0
    assert 0 < distance < lpips(image + 0.5 * noise, image)
    assert not any(p.requires_grad for p in lpips.parameters())


def test_it_is_vgg_that_was_given(weights):
    lpips = LPIPS(str(weights))
    state = torch.load(weights, weights_only=True)
    assert torch.equal(lpips.network.net.state_dict()["slice5.28.weight"], state["features.28.weight"])


def test_missing_and_foreign_weights_name_the_key(tmp_path):
    with pytest.raises(UserError, match=r"training\.perceptual\.weights: no file"):
        LPIPS(str(tmp_path / "nothing.pth"))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=r"does not hold torchvision's VGG16"):
        LPIPS(str(tmp_path / "foreign.pth"))


def test_distances_are_one_an_image_and_their_mean_is_the_loss(weights):
    lpips = LPIPS(str(weights))
    torch.manual_seed(0)
    first, second = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    second[1] = first[1]
    distances = lpips.distances(first, second)
    assert (distances.shape, distances.dtype) == ((3,), torch.float32)
    assert distances[1] == 0 < distances[0] != distances[2]
    torch.testing.assert_close(distances[2:], lpips.distances(first[2:], second[2:]))
    torch.testing.assert_close(lpips(first, second), distances.mean())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lpips.distances(first, second), distances)


def test_damaged_weights_and_whose_key(weights, tmp_path):
    path = tmp_path / "damaged.pth"
    for content in (b"", b"<html>", weights.read_bytes()[:-1000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^training\.perceptual\.weights: .*damaged\.pth cannot be read") as error:
            LPIPS(str(path))
        assert "\n" not in str(error.value)
    for contents in ([1], {"features.0.weight": "text"}):
        torch.save(contents, path)
        with pytest.raises(UserError, match=r"^scores\.x: .*damaged\.pth does not hold torchvision's VGG16"):
            LPIPS(str(path), key="scores.x", remedy="leave it out")
    with pytest.raises(UserError, match=r"^scores\.x: no file .* or leave it out$"):
        LPIPS(str(tmp_path / "nothing.pth"), key="scores.x", remedy="leave it out")


@pytest.mark.parametrize("cached", [None, b"<html>404</html>"], ids=["nothing", "damaged"])
def test_neither_download_nor_cache(cached, tmp_path, monkeypatch):
    """The hub is a port of this machine that nothing listens on."""
    monkeypatch.setattr(VGG16_Weights.IMAGENET1K_V1.value, "url", "http://127.0.0.1:9/vgg16-397923af.pth", raising=True)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    if cached is not None:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "vgg16-397923af.pth").write_bytes(cached)
    with pytest.raises(UserError, match=r"^training\.perceptual\.weights: VGG16 can be neither .*perceptual_weight=0$"):
        LPIPS()
