import pytest
import torch
from torchvision.models import vgg16

from grn.errors import UserError
from grn.networks.perceptual import LPIPS


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
