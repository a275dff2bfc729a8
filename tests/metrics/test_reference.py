"""Real images that are given as a path, sFID, and statistics files: what FID compares with."""

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from scipy.linalg import sqrtm
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from grn.evaluation.statistics import statistics
from grn.metrics.features import SpatialFeatures, build_extractor, extract
from grn.metrics.fid import GenerationScores, frechet_distance, load_statistics
from grn.metrics.reference import holds_images, images_at
from grn.metrics.splits import image_batches
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError

KEY = "scores.fid.reference"


@pytest.fixture
def pictures(digits):
    return digits["train"][0][:150]


@pytest.fixture
def folder(pictures, tmp_path):
    for number, picture in enumerate(pictures):
        part = tmp_path / "real" / f"part{number % 2}"
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(part / f"{number:04d}.png")
    (tmp_path / "real" / "notes.txt").write_text("not an image")
    return tmp_path / "real"


@pytest.fixture
def array(pictures, tmp_path):
    np.savez_compressed(tmp_path / "batch.npz", arr_0=pictures.permute(0, 2, 3, 1).numpy(), labels=np.zeros(150))
    return tmp_path / "batch.npz"


def scores_of(reference, classifier_weights, **keys):
    given = {"extractor": "digits-classifier", "weights": classifier_weights, "isc": False} | keys
    return GenerationScores(train=tuple, val=tuple, reference=str(reference), **given)


def test_images_of_a_folder_and_of_an_array_are_the_ones_written(folder, array, pictures):
    read = torch.cat(list(image_batches(images_at(array, key=KEY), name="x")))
    assert torch.equal(read, pictures)
    read = torch.cat(list(image_batches(images_at(folder, key=KEY), name="x")))
    assert torch.equal(read, torch.cat([pictures[0::2], pictures[1::2]]))  # by their names


def test_fid_kid_and_precision_are_those_of_the_split(folder, array, pictures, digits, classifier_weights):
    def measured(reference, train=tuple):
        keys = {"kid": True, "kid_subset_size": 50, "prc": True}
        scores = GenerationScores(
            train=train,
            val=tuple,
            reference=str(reference),
            extractor="digits-classifier",
            weights=classifier_weights,
            isc=False,
            **keys,
        )
        scores.update(digits["val"][0])
        return scores.compute()

    expected = measured("train", lambda: [{"pixels": pictures}])
    for reference in (folder, array):
        found = measured(reference)
        for name in ("fid", "precision", "recall"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert measured(array) == pytest.approx(expected, rel=1e-5)
    assert expected["fid"] > 1


def test_fid_is_that_of_pytorch_fids_formula(array, pictures, digits, classifier_weights):
    """|mu1 - mu2|^2 + tr(C1) + tr(C2) - 2 tr(sqrtm(C1 C2)), computed with scipy."""
    extractor = build_extractor("digits-classifier", ["64"], weights=classifier_weights)
    a, b = (extract(extractor, images)["64"].double().numpy() for images in (digits["val"][0], pictures))
    covariances = [np.cov(features, rowvar=False) for features in (a, b)]
    offset = a.mean(0) - b.mean(0)
    expected = (
        offset @ offset + sum(map(np.trace, covariances)) - 2 * np.trace(sqrtm(covariances[0] @ covariances[1]).real)
    )
    scores = scores_of(array, classifier_weights)
    scores.update(digits["val"][0])
    assert scores.compute()["fid"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arr_0", "message"),
    [
        (np.zeros((4, 8, 8), np.uint8), r"uint8 \[4, 8, 8\], not uint8 \[N, H, W, 3\]"),
        (np.zeros((4, 8, 8, 3)), r"float64 \[4, 8, 8, 3\], not"),
        (np.array([None] * 4), "object"),
    ],
)
def test_arrays_of_another_kind(tmp_path, arr_0, message):
    np.savez(tmp_path / "bad.npz", arr_0=arr_0)
    with pytest.raises(UserError, match=rf"^scores\.fid\.reference: arr_0 of .*bad\.npz .*{message}"):
        list(images_at(tmp_path / "bad.npz", key=KEY)())


def test_damaged_files(folder, array, tmp_path):
    (folder / "part0" / "0000.png").write_bytes(b"\x89PNG no")
    with pytest.raises(UserError, match=r"^scores\.fid\.reference: .*0000\.png cannot be read"):
        list(images_at(folder, key=KEY)())
    content = bytearray(array.read_bytes())
    content[200:260] = bytes(60)
    array.write_bytes(content)
    with pytest.raises(UserError, match=r"^scores\.fid\.reference: arr_0 of .* cannot be read"):
        list(images_at(array, key=KEY)())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^scores\.fid\.reference: no images in .*empty"):
        images_at(tmp_path / "empty", key=KEY)
    (tmp_path / "text.npz").write_text("no archive")
    assert not holds_images(tmp_path / "text.npz")
    assert not holds_images(None)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Path of Inception's weights, random."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: None)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], "none").state_dict(), path)
    return path


def test_spatial_features_are_the_branch_of_adm(inception):
    """The first 7 of 192 channels of Mixed_6d's 1x1 branch, rows, then columns, then channels."""
    extractor = build_extractor("inception-v3-compat", ["2048"], weights=inception)
    images = torch.randint(256, (2, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    spatial = SpatialFeatures(extractor)
    extract(extractor, images)
    found = spatial.take()
    x = (interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False) - 128) / 128
    names = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 Mixed_5b"
    for name in f"{names} Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d.branch1x1".split():
        x = extractor.get_submodule(name)(x)
    assert found.shape == (2, 2023)
    torch.testing.assert_close(found.view(2, 17, 17, 7), x.permute(0, 2, 3, 1)[..., :7])
    assert found.std() > 0


@pytest.mark.full
def test_sfid_is_the_distance_of_spatial_features(inception, tmp_path):
    real, generated = torch.randint(256, (2, 6, 3, 20, 20), dtype=torch.uint8).unbind()
    splits = {"train": lambda: [{"pixels": real}], "val": tuple}
    scores = GenerationScores(**splits, reference="train", weights=inception, isc=False, sfid=True, cache_dir=tmp_path)
    scores.update(generated[:4])
    scores.update(generated[4:])
    extractor = build_extractor("inception-v3-compat", ["2048"], weights=inception)
    spatial, sums = SpatialFeatures(extractor), []
    for images in (generated, real):
        extract(extractor, images)
        features = spatial.take().double().numpy()
        sums.append({"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)})
    found = scores.compute()
    assert found["sfid"] == pytest.approx(frechet_distance(*sums), rel=1e-4)
    assert found["sfid_samples"] == 6
    assert found["sfid"] != found["fid"]


def test_sfid_needs_inception(array, classifier_weights):
    with pytest.raises(UserError, match=r"^scores\.fid\.sfid reads spatial features of inception-v3-compat"):
        scores_of(array, classifier_weights, sfid=True)


def test_statistics_of_an_npz_have_their_own_names(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3), mu_s=np.ones(5), sigma_s=np.eye(5) * 2)
    assert load_statistics(tmp_path / "a.npz", 3)["mu"].tolist() == [0, 0, 0]
    found = load_statistics(tmp_path / "a.npz", 5, names=("mu_s", "sigma_s"))
    assert found["mu"].tolist() == [1] * 5
    assert found["sigma"][1, 1] == 2
    np.savez(tmp_path / "b.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match=r"b\.npz has no mu_s: an npz with mu_s and sigma_s is needed"):
        load_statistics(tmp_path / "b.npz", 5, names=("mu_s", "sigma_s"))


def test_the_command_writes_what_scores_read(folder, pictures, digits, classifier_weights, tmp_path):
    given = ["what=statistics", f"statistics.folder={folder}", "statistics.images=100", f"out={tmp_path}/out"]
    given += ["statistics.extractor=digits-classifier", f"statistics.weights={classifier_weights}", "device=cpu"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        path = statistics(compose("evaluate", given))
    assert path == tmp_path / "out" / "statistics.npz"
    with np.load(path) as arrays:
        assert arrays["arr_0"].shape == (100, 32, 32, 3)
        assert int(arrays["num"]) == 150
    own, of_folder = scores_of(path, classifier_weights, prc=True), scores_of(folder, classifier_weights)
    for scores in (own, of_folder):
        scores.update(digits["val"][0])
    assert own.compute()["fid"] == pytest.approx(of_folder.compute()["fid"], rel=1e-6)
    assert 0 < own.compute()["precision"] <= 1
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("evaluate", ["what=statistics", "device=cpu", f"out={tmp_path}/none", *given[3:]])
    with pytest.raises(UserError, match=r"^what=statistics reads data: choose data=imagenet"):
        statistics(config)
