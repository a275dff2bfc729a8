import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from grn.metrics.features import build_extractor, extract
from grn.runtime.errors import UserError
from grn.toys import digits_classifier
from grn.toys.digits_classifier import NAME, DigitsClassifier, digits_classifier_weights


def accuracy(weights, images, labels):
    logits = extract(build_extractor(NAME, ["logits"], weights=weights), images)["logits"]
    return (logits.argmax(dim=1) == labels).float().mean().item()


def test_is_registered():
    assert FEATURE_EXTRACTORS_REGISTRY[NAME] is DigitsClassifier


def test_reads_val_digits(classifier_weights, digits):
    assert accuracy(classifier_weights, *digits["val"]) >= 0.97


def test_logits_are_of_the_features(classifier_weights, digits):
    extractor = build_extractor(NAME, ["64", "logits"], weights=classifier_weights)
    features = extract(extractor, digits["val"][0])
    torch.testing.assert_close(extractor.network.head(features["64"]), features["logits"])
    assert (features["64"].std(dim=0) > 0).all()  # no dead unit makes the covariance singular


@pytest.fixture
def one_epoch(monkeypatch):
    monkeypatch.setattr(digits_classifier, "EPOCHS", 1)


def test_training_is_deterministic_and_leaves_the_caller_alone(one_epoch, digits, tmp_path):
    images, labels = (values[:300] for values in digits["train"])
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = digits_classifier_weights(images, labels, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    # As a callback of a validation epoch finds the world.
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        second = digits_classifier_weights(images.clone(), labels.clone(), tmp_path / "b")
    assert first.name == second.name
    ours, theirs = load_file(first), load_file(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_are_found_again_and_belong_to_their_data(one_epoch, digits, tmp_path, monkeypatch):
    images, labels = (values[:100] for values in digits["train"])
    first = digits_classifier_weights(images, labels, tmp_path)
    other_labels = digits_classifier_weights(images, (labels + 1) % 10, tmp_path)
    other_images = digits_classifier_weights(255 - images, labels, tmp_path)
    assert len({first, other_labels, other_images}) == 3
    monkeypatch.setattr(digits_classifier, "_train", None)
    assert digits_classifier_weights(images, labels, tmp_path) == first


def test_a_failed_write_leaves_nothing(one_epoch, digits, tmp_path, monkeypatch):
    def fail(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(digits_classifier, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        digits_classifier_weights(*(values[:50] for values in digits["train"]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line(digits, tmp_path):
    images, labels = (values[:10] for values in digits["train"])
    for wrong in (labels + 10, labels - 10, labels[:5], labels[:0]):
        with pytest.raises(UserError, match="needs a label in"):
            digits_classifier_weights(images, wrong, tmp_path)
    with pytest.raises(UserError, match="reads uint8"):
        digits_classifier_weights(images[..., :28], labels, tmp_path)
    with pytest.raises(UserError, match=r"scores\.fid\.weights.*digits_classifier_weights"):
        build_extractor(NAME, ["64"])
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=r"scores\.fid\.weights.*bad\.safetensors"):
        build_extractor(NAME, ["64"], weights=tmp_path / "bad.safetensors")
    save_file({"head.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"scores\.fid\.weights.*other\.safetensors"):
        build_extractor(NAME, ["64"], weights=tmp_path / "other.safetensors")
