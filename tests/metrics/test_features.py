import pickle

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics

from grn.metrics.features import FeatureStatistics, build_extractor, extract, widths
from grn.runtime.errors import UserError


@pytest.fixture
def features():
    return torch.randn(501, 12, generator=torch.Generator().manual_seed(0)) * 3 + 50


def test_statistics_are_those_of_torch_fidelity(features):
    statistics = FeatureStatistics(12)
    for batch in features.split(64):
        statistics.update(batch)
    ours, theirs = statistics.compute(), fid_features_to_statistics(features.double())
    assert ours["n"] == 501
    np.testing.assert_allclose(ours["mu"].numpy(), theirs["mu"], rtol=1e-13)
    np.testing.assert_allclose(ours["sigma"].numpy(), theirs["sigma"], rtol=0, atol=1e-10)


def test_a_large_mean_and_float16_features_lose_nothing(features):
    """The sums must be float64: in float32 this covariance would be off by more than its own size."""
    features = (features / 100 + 1000).half()
    statistics = FeatureStatistics(12)
    statistics.update(features)
    sigma = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(statistics.compute()["sigma"].numpy(), sigma, atol=1e-7)


def test_statistics_made_in_inference_mode_go_on_outside(features):
    with torch.inference_mode():
        statistics = FeatureStatistics(12)
        statistics.update(features[:200])
    statistics.update(features[200:])
    np.testing.assert_allclose(statistics.compute()["mu"].numpy(), features.double().mean(0).numpy(), rtol=1e-13)


def test_extractor_gives_the_named_features_in_float32_under_autocast(classifier_weights, digits):
    extractor = build_extractor("digits-classifier", ["logits", "64"], weights=classifier_weights)
    assert widths(extractor) == {"logits": 10, "64": 64}
    images = digits["val"][0][:8]
    plain = extract(extractor, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(extract(extractor, images), plain, rtol=0, atol=0)
    assert not any(value.requires_grad for value in plain.values())


def test_unknown_extractor_and_feature_name_the_choices():
    with pytest.raises(UserError, match=r"scores\.fid\.extractor.*'inception'.*inception-v3-compat"):
        build_extractor("inception", ["2048"])
    with pytest.raises(UserError, match=r"scores\.fid\.features.*'2047'.*2048"):
        build_extractor("inception-v3-compat", ["2047"])


def test_missing_and_foreign_weights(tmp_path):
    def build(path):
        return build_extractor("inception-v3-compat", ["2048"], weights=path)

    with pytest.raises(UserError, match=r"scores\.fid\.weights.*nowhere\.pth"):
        build(tmp_path / "nowhere.pth")
    (tmp_path / "noise.pth").write_bytes(b"not weights at all")
    with pytest.raises(UserError, match=r"scores\.fid\.weights.*noise\.pth"):
        build(tmp_path / "noise.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"scores\.fid\.weights.*other\.pth") as error:
        build(tmp_path / "other.pth")
    assert "\n" not in str(error.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_weights_cannot_run_code(tmp_path, save):
    """torch-fidelity itself asks for free unpickling."""
    save({"weight": Malicious(tmp_path / "owned")}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"scores\.fid\.weights"):
        build_extractor("inception-v3-compat", ["2048"], weights=tmp_path / "bad.pth")
    assert not (tmp_path / "owned").exists()


def test_no_internet_says_which_file_to_give(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionRefusedError("no route to host")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=r"scores\.fid\.weights.*weights-inception-2015-12-05-6726825d\.pth") as error:
        build_extractor("inception-v3-compat", ["2048"])
    assert "\n" not in str(error.value)
