from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch_fidelity import feature_extractor_inceptionv3 as module

from grn.runtime.errors import UserError
from grn.toys import digits_classifier

CONF = Path(__file__).parents[2] / "conf" / "scores"


@pytest.fixture
def load(tmp_path):
    def load(name):
        config = OmegaConf.create({"paths": {"data": str(tmp_path)}, "scores": OmegaConf.load(CONF / f"{name}.yaml")})
        return instantiate(config.scores)

    return load


def test_digits(load, splits, digits, tmp_path, monkeypatch):
    """Every score of the config takes the same keywords, trains what it needs, and gives numbers of its own name."""
    monkeypatch.setattr(digits_classifier, "EPOCHS", 1)  # how well it reads is another test's matter
    keywords = {**splits, "device": "cpu", "cache_dir": tmp_path / "cache"}
    scores = {name: make(**keywords) for name, make in load("digits").items()}
    assert set(scores) == {"fid", "judge", "nearest"}
    values = {}
    for score in scores.values():
        score.update(*digits["val"])
        new = score.compute()
        assert not values.keys() & new.keys()
        values |= new
    assert all(type(value) in (int, float) and np.isfinite(value) for value in values.values())
    assert {"fid", "fid_val", "isc_mean", "isc_std", "judge_accuracy", "nn_median_ratio"} <= values.keys()
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".npz", ".safetensors"}


def test_digits_reconstruction_is_against_the_val_images(load, splits, digits, classifier_weights):
    score = load("digits_reconstruction")["fid"](**splits, device="cpu", cache_dir=classifier_weights.parent)
    score.update(digits["val"][0])
    assert score.compute() == {"fid": pytest.approx(0, abs=1e-3), "fid_samples": len(digits["val"][0])}


def test_imagenet_reads_its_statistics(load, splits, tmp_path, monkeypatch):
    """Without Inception's weights at hand: the network as torch-fidelity builds it, with random ones."""
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    keywords = {**splits, "device": "cpu", "cache_dir": None}
    with pytest.raises(UserError, match=r"scores\.fid\.reference.*imagenet256_stats\.npz"):
        load("imagenet")["fid"](**keywords)
    np.savez(tmp_path / "imagenet256_stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    score = load("imagenet")["fid"](**keywords)
    assert (score.fid_features, score.isc_features) == ("2048", "logits_unbiased")
    assert score.logits.shape == (1008,)
    score.update(next(splits["train"]())["pixels"][:2].squeeze(2))
    assert score.statistics.n == 2


def test_fvd_asks_for_its_network(load, splits):
    config = load("fvd")
    with pytest.raises(UserError, match=r"scores\.fvd\.network\.path must be given: .*i3d_torchscript\.pt"):
        config["fvd"](**splits, device="cpu", cache_dir=None)
