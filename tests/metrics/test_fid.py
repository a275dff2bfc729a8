import numpy as np
import pytest
import torch
import torch_fidelity
from torch.utils.data import Dataset

from grn.metrics.features import build_extractor, extract
from grn.metrics.fid import GenerationScores, load_statistics
from grn.metrics.splits import labelled_images
from grn.runtime.errors import UserError
from grn.toys.digits_classifier import digits_classifier_weights


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture(scope="module")
def generated(digits):
    """Noisy held-out digits, uint8 [297, 3, 32, 32]."""
    return noisy(digits["val"][0])


def noisy(images, size=40):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * size
    return (images.float() + noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture
def make_scores(splits, classifier_weights):
    def make(**keys):
        keys = {"reference": "train", "extractor": "digits-classifier", "weights": classifier_weights} | keys
        return GenerationScores(**({"train": splits["train"], "val": splits["val"]} | keys))

    return make


def torch_fidelitys(images, real, weights, **asked):
    """Its scores of images, by the digits' classifier."""
    return torch_fidelity.calculate_metrics(
        input1=Images(images),
        input2=Images(real),
        cuda=False,
        feature_extractor="digits-classifier",
        feature_extractor_weights_path=str(weights),
        verbose=False,
        **asked,
    )


def test_equals_torch_fidelity(make_scores, generated, digits, classifier_weights):
    """The same images and extractor, the same FID and inception score."""
    theirs = torch_fidelitys(generated, digits["train"][0], classifier_weights, fid=True, isc=True, save_cpu_ram=True)
    scores = make_scores()
    for batch in generated.split(50):
        scores.update(batch, None)
    ours = scores.compute()
    # 7e-7 apart here: torch-fidelity takes the mean of the features in float32, whose rounding is the machine's.
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=5e-6)
    assert ours["isc_mean"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["isc_std"] == pytest.approx(theirs["inception_score_std"], rel=1e-6)
    assert ours["fid"] > 10  # else the agreement would say little


@pytest.mark.parametrize(
    "keys",
    [pytest.param({}, marks=pytest.mark.full), {"kid_subsets": 7, "kid_subset_size": 100, "prc_neighborhood": 5}],
)
def test_kid_precision_and_recall_equal_torch_fidelity(make_scores, generated, digits, classifier_weights, keys):
    """With its defaults and with keys of ours, whose names are its own."""
    real = digits["train"][0]
    images = generated if keys else noisy(real, 80)  # enough for the default size of a subset
    theirs = torch_fidelitys(images, real, classifier_weights, kid=True, prc=True, **keys)
    scores = make_scores(isc=False, kid=True, prc=True, **keys)
    for batch in images.split(50):
        scores.update(batch, None)
    ours = scores.compute()
    assert ours.keys() == {"fid", "fid_samples", "kid_mean", "kid_std", "precision", "recall", "f_score"}
    assert ours["kid_mean"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    assert ours["kid_std"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-5)
    # At most one image may lie so near the edge of a ball that the rounding of its distance decides.
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1.1 / len(images))
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1.1 / len(real))
    assert ours["f_score"] == pytest.approx(theirs["f_score"], abs=0.01)
    assert 0.1 < ours["precision"] < 1  # else the agreement would say little
    assert ours["kid_mean"] > 0.01


@pytest.mark.parametrize("key", ["kid", "prc"])
def test_statistics_alone_hold_no_real_images(make_scores, key):
    with pytest.raises(UserError, match=rf"scores\.fid\.{key} .*reference=stats\.npz .*train, val"):
        make_scores(reference="stats.npz", **{key: True})


@pytest.mark.parametrize("key", ["kid_subsets", "kid_subset_size", "prc_neighborhood", "isc_splits"])
def test_numbers_that_are_too_small(make_scores, key):
    with pytest.raises(UserError, match=rf"scores\.fid\.{key} must be at least"):
        make_scores(**{key: 0})


def test_too_few_images_for_kid_or_balls(make_scores, generated):
    with pytest.raises(UserError, match=r"kid_subset_size=1501 .* real images: 1500"):
        make_scores(kid=True, kid_subset_size=1501)
    for keys, message in (
        ({"kid": True, "kid_subset_size": 11}, r"kid_subset_size=11 .* generated images: 10"),
        ({"prc": True, "prc_neighborhood": 10}, r"prc_neighborhood=10 .* generated images than 10"),
    ):
        scores = make_scores(**keys)
        scores.update(generated[:10])
        with pytest.raises(UserError, match=message):
            scores.compute()


@pytest.mark.parametrize("batch", [1, 37, 297])
def test_batch_size_does_not_matter(make_scores, generated, batch):
    whole, parts = make_scores(), make_scores()
    for some in generated.split(batch):
        parts.update(some)
    for some in generated.split(100):
        whole.update(some)
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-6)


def test_reset_forgets_the_images_and_keeps_the_reference(make_scores, generated):
    scores = make_scores()
    scores.update(generated)
    first = scores.compute()
    scores.reset()
    scores.update(generated[:100])
    assert scores.compute()["fid"] != pytest.approx(first["fid"], rel=1e-3)
    scores.reset()
    scores.update(generated)
    assert scores.compute() == first


def test_val_fid_is_that_of_the_val_images(make_scores, digits):
    scores = make_scores(val_fid=True)
    scores.update(digits["val"][0])
    values = scores.compute()
    assert values["fid_val"] == pytest.approx(values["fid"], rel=1e-6)
    assert make_scores(reference="val", val_fid=True).val_fid == pytest.approx(0, abs=1e-3)


def test_no_inception_score_unless_asked(make_scores, generated):
    scores = make_scores(isc=False)
    scores.update(generated)
    assert set(scores.compute()) == {"fid", "fid_samples"}


def test_fid_and_inception_score_may_share_their_features(make_scores, generated):
    scores = make_scores(features="logits")
    scores.update(generated)
    assert set(scores.compute()) == {"fid", "fid_samples", "isc_mean", "isc_std"}


def test_npz_reference_gives_the_number_of_the_split(make_scores, generated, digits, classifier_weights, tmp_path):
    extractor = build_extractor("digits-classifier", ["64"], weights=classifier_weights)
    features = extract(extractor, digits["train"][0])["64"].double().numpy()
    path = tmp_path / "stats.npz"
    # A reference of float32 and with images beside it, as ImageNet's comes.
    arrays = {"mu": features.mean(0).astype(np.float32), "sigma": np.cov(features, rowvar=False)}
    np.savez(path, arr_0=np.zeros((4, 8, 8, 3), np.uint8), **arrays)
    split, npz = make_scores(), make_scores(reference=str(path))
    for scores in (split, npz):
        scores.update(generated)
    assert npz.compute()["fid"] == pytest.approx(split.compute()["fid"], rel=1e-5)


def test_statistics_of_a_split_are_cached(make_scores, splits, make_split, digits, generated, tmp_path, monkeypatch):
    first = make_scores(cache_dir=tmp_path)
    (cached,) = tmp_path.glob("*.npz")
    # Other batches of the same images hit the cache; only the generated images need the extractor.
    monkeypatch.setattr("grn.metrics.fid.extract", None)
    again = make_scores(cache_dir=tmp_path, train=make_split(digits["train"][0], batch=333))
    np.testing.assert_array_equal(again.reference["sigma"], first.reference["sigma"])
    monkeypatch.undo()
    # Other images or other features do not.
    make_scores(cache_dir=tmp_path, train=make_split(digits["train"][0][:-1]))
    make_scores(cache_dir=tmp_path, features="logits")
    assert len(list(tmp_path.iterdir())) == 3
    cached.write_bytes(cached.read_bytes()[:1000])
    with pytest.raises(UserError, match=cached.name):
        make_scores(cache_dir=tmp_path)


@pytest.mark.parametrize("cached", [True, False])
def test_weights_may_be_made_of_the_training_split(make_scores, classifier_weights, generated, tmp_path, cached):
    folders = []

    def weights(images, labels, cache_dir):
        assert images.shape == (1500, 3, 32, 32)
        assert labels.shape == (1500,)
        folders.append(cache_dir)
        return classifier_weights

    scores = make_scores(weights=weights, cache_dir=tmp_path if cached else None)
    scores.update(generated)
    plain = make_scores()
    plain.update(generated)
    assert scores.compute() == plain.compute()
    assert (folders[0] == tmp_path) == cached


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(4)}, "no sigma"),
        ({"mu": np.zeros(5), "sigma": np.zeros((4, 4))}, "mu .* shape"),
        ({"mu": np.zeros(4), "sigma": np.zeros((4, 5))}, "sigma .* shape"),
        ({"mu": np.zeros(4), "sigma": np.zeros((64, 64))}, "sigma .* larger"),
        ({"mu": np.full(4, np.nan), "sigma": np.zeros((4, 4))}, "mu .* finite"),
        ({"mu": np.array(["a"] * 4), "sigma": np.zeros((4, 4))}, "mu .* finite"),
        ({"mu": np.array([None] * 4), "sigma": np.zeros((4, 4))}, "not a readable npz"),
    ],
)
def test_bad_reference_is_one_line(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=rf"scores\.fid\.reference.*{message}") as error:
        load_statistics(tmp_path / "bad.npz", 4)
    assert "\n" not in str(error.value)
    assert "bad.npz" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x04N."])
def test_file_that_is_no_npz(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"scores\.fid\.reference.*not a readable npz"):
        load_statistics(tmp_path / "bad.npz", 4)


@pytest.mark.parametrize("reference", [None, "nowhere.npz", "validation"])
def test_missing_reference(make_scores, reference):
    with pytest.raises(UserError, match=r"scores\.fid\.reference: no such file"):
        make_scores(reference=reference)


def test_too_few_images(make_scores, digits):
    scores = make_scores(isc=False)
    scores.update(digits["val"][0][:1])
    with pytest.raises(UserError, match="at least 2 images"):
        scores.compute()
    scores = make_scores(isc_splits=10)
    scores.update(digits["val"][0][:9])
    with pytest.raises(UserError, match="at least 10 images"):
        scores.compute()
    with pytest.raises(UserError, match=r"scores\.fid\.isc_splits"):
        make_scores(isc_splits=0)


def test_of_clips_every_frame_counts(make_scores, digits):
    pixels, labels = digits["val"]
    images, clips = pixels[:40], pixels[:40].view(8, 5, *pixels.shape[1:]).transpose(1, 2)
    as_images, as_clips = (make_scores(reference="val", val=lambda x=x: [{"pixels": x}]) for x in (images, clips))
    for scores in (as_images, as_clips):
        scores.update(pixels[40:80])
    assert as_images.compute() == as_clips.compute()
    frames, of_frames = labelled_images(lambda: [{"pixels": clips, "label": labels[:40:5]}], name="held-out")
    assert torch.equal(frames, images)
    assert of_frames.tolist() == labels[:40:5].repeat_interleave(5).tolist()


def test_bad_data_is_one_line(make_scores, make_split, digits, splits):
    with pytest.raises(UserError, match="training split has no images"):
        make_scores(train=make_split(digits["train"][0][:0]))
    with pytest.raises(UserError, match="float32"):
        make_scores(train=lambda: [{"pixels": torch.zeros(1, 3, 32, 32)}])
    with pytest.raises(UserError, match="training split has no labels"):
        make_scores(train=make_split(digits["train"][0]), weights=digits_classifier_weights)
    with pytest.raises(UserError, match=r"scores\.fid\.extractor: digits-classifier reads"):
        make_scores().update(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"scores\.fid\.extractor: 'inceptoin'"):
        make_scores(extractor="inceptoin")
