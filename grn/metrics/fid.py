"""FID, inception score, KID, precision and recall, equal to torch-fidelity's; sFID as ADM's evaluator has it.

FID: Heusel et al., arXiv 1706.08500. Inception score: Salimans et al., arXiv 1606.03498. KID: Binkowski et al., arXiv
1801.01401. Precision and recall: Kynkaanniemi et al., arXiv 1904.06991. sFID: Nash et al., arXiv 2103.03841; ADM's
evaluator: github.com/openai/guided-diffusion/tree/main/evaluations.
"""

import hashlib
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import (
    KEY_METRIC_F_SCORE,
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    prc_features_to_metric,
)
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from grn.metrics.features import INCEPTION, FeatureStatistics, SpatialFeatures, build_extractor, extract, widths
from grn.metrics.ranks import Rows
from grn.metrics.reference import holds_images, images_at, is_folder
from grn.metrics.splits import Split, image_batches, image_digest, labelled_images
from grn.runtime.errors import UserError
from grn.runtime.locks import write_cached

Statistics = dict[str, np.ndarray]  # mu float64 [width], sigma float64 [width, width]
SPATIAL_WIDTH = 17 * 17 * SpatialFeatures.CHANNELS
POOLED, SPATIAL = ("mu", "sigma"), ("mu_s", "sigma_s")  # their names in an npz
KEY = "scores.fid.reference"
SPLITS = ("train", "val")


class GenerationScores:
    """FID and the like of generated images, from one pass of one feature extractor.

    `compute` gives `fid`, `fid_samples` (how many images it is of, on which it depends) and, where asked for, `sfid`,
    `isc_mean` and `isc_std`, `kid_mean` and `kid_std`, `precision`, `recall` and `f_score`, and `fid_val`. They are
    what `torch_fidelity.calculate_metrics` reports for the same images in the same order, and do not depend on how the
    images are cut into batches or dealt to ranks (but for what the size of a batch does to the last bits of the
    extractor's float32; see `Rows` for the order over ranks).

    Args:
        train, val: the splits (`grn.metrics.splits`), read only where a key asks for them.
        device: where the extractor runs and the sums are kept; it must have float64.
        cache_dir: where the statistics of a split and trained weights are kept; None keeps them in memory.
        reference: the split `train` or `val`; a folder of images; or an npz with `mu` [width] and `sigma` [width,
            width], for sFID `mu_s` and `sigma_s`, for KID, precision and recall real images `arr_0` uint8 [N, H, W, 3].
            ADM's reference batches have all of these; what statistics an npz with `arr_0` lacks are computed of that.
        extractor: a feature extractor registered with torch-fidelity.
        features: its features for FID, KID, precision and recall; None takes the extractor's default for FID.
        weights: local path of its weights; None downloads them; or a callable that makes them out of the training
            split: (images uint8 [N, 3, H, W], labels int64 [N], cache_dir) -> path.
        isc: whether to report the inception score.
        isc_splits: into how many parts the images, shuffled with torch-fidelity's seed, are cut for its mean and std.
        val_fid: whether to report, for scale, `fid_val`: the FID of the real held-out images.
        sfid: whether to report sFID, by Inception's spatial features.
        kid: whether to report the kernel inception distance; for it, and for `prc`, the features of all images of
            `reference` and all generated ones are kept: 4 bytes a feature.
        kid_subsets, kid_subset_size: it is the mean over so many random subsets of so many images.
        prc: whether to report precision and recall.
        prc_neighborhood: an image's ball reaches to its neighbor of this number.

    Raises:
        UserError: naming the key, for an extractor, weights or a reference that cannot be had or do not fit together.
    """

    def __init__(
        self,
        *,
        train: Split,
        val: Split,
        device: torch.device | str = "cpu",
        cache_dir: str | Path | None = None,
        reference: str | Path,
        extractor: str = INCEPTION,
        features: str | None = None,
        weights: str | Path | Callable[[Tensor, Tensor, str | Path], Path] | None = None,
        isc: bool = True,
        isc_splits: int = 10,
        val_fid: bool = False,
        sfid: bool = False,
        kid: bool = False,
        kid_subsets: int = 100,
        kid_subset_size: int = 1000,
        prc: bool = False,
        prc_neighborhood: int = 3,
    ):
        splits = {"train": (train, "training"), "val": (val, "held-out")}
        _check_numbers(
            isc_splits=isc_splits,
            kid_subsets=kid_subsets,
            kid_subset_size=kid_subset_size,
            prc_neighborhood=prc_neighborhood,
        )
        _check_real("kid" if kid else "prc" if prc else None, reference)
        self.fid_features = features if features is not None else default_features(extractor, "fid")
        self.isc_features: Any = default_features(extractor, "isc") if isc else None
        self.isc_splits = isc_splits
        self.kid = {"kid_subsets": kid_subsets, "kid_subset_size": kid_subset_size} if kid else None
        self.prc = {"prc_neighborhood": prc_neighborhood} if prc else None
        wanted = [self.fid_features] + ([self.isc_features] if isc and self.isc_features != self.fid_features else [])
        # Weights that are made here are read into the extractor at once, so a scratch folder does for them.
        with tempfile.TemporaryDirectory() as scratch:
            if callable(weights):
                weights = weights(*labelled_images(train, name="training"), cache_dir or scratch)
            self.extractor = build_extractor(extractor, wanted, weights=weights, device=device)

        width = widths(self.extractor)
        self.statistics = FeatureStatistics(width[self.fid_features]).to(device)
        # None, and so is their reference, unless sFID is reported.
        self.spatial: Any = SpatialFeatures(self.extractor) if sfid else None
        self.spatial_statistics: Any = FeatureStatistics(SPATIAL_WIDTH).to(device) if sfid else None
        self.logits = Rows(width[self.isc_features]).to(device) if isc else None
        self._find_reference(reference, splits, cache_dir)
        self.features = self.real_features = None
        if kid or prc:
            self.features = Rows(width[self.fid_features]).to(device)
            self.real_features = self._split_features(*self._real_images(reference, splits))
            self._check_sizes(len(self.real_features), "real")
        self.val_fid = None
        if val_fid:
            own = self._split_statistics(val, "held-out", cache_dir)
            self.val_fid = frechet_distance(own, self.reference)

    def _find_reference(
        self, reference: str | Path, splits: dict[str, tuple[Split, str]], cache_dir: str | Path | None
    ) -> None:
        def found(width: int, names: tuple[str, str], *, spatial: bool = False) -> Statistics:
            if _has_statistics(reference, names):
                return load_statistics(reference, width, names=names)
            return self._split_statistics(*self._real_images(reference, splits), cache_dir, spatial=spatial)

        self.reference = found(len(self.statistics.sum), POOLED)
        self.spatial_reference: Any = None if self.spatial is None else found(SPATIAL_WIDTH, SPATIAL, spatial=True)

    @staticmethod
    def _real_images(reference: str | Path, splits: Mapping[Any, tuple[Split, str]]) -> tuple[Split, str]:
        return splits[reference] if reference in splits else (images_at(reference, key=KEY), str(reference))

    @classmethod
    def check(
        cls,
        num: int | None,
        *,
        reference: str | Path,
        weights: str | Path | Callable[..., Path] | None = None,
        isc: bool = True,
        isc_splits: int = 10,
        kid: bool = False,
        kid_subset_size: int = 1000,
        prc: bool = False,
        prc_neighborhood: int = 3,
        **others: Any,
    ) -> None:
        """What can be known of its arguments before there are images; reads no split, and makes no weights.

        Args:
            num: how many images will be scored; None: not known.

        Raises:
            UserError: as from the constructor, and as from `compute` by too few images.
        """
        options: dict[str, Any] = {"isc": isc, "isc_splits": isc_splits, "kid": kid, "kid_subset_size": kid_subset_size}
        options |= {"prc": prc, "prc_neighborhood": prc_neighborhood}
        _check_real("kid" if kid else "prc" if prc else None, reference)
        if _has_statistics(reference, POOLED):
            load_statistics(reference, None)  # before anything is downloaded
            if not callable(weights):
                splits: dict[str, Any] = dict.fromkeys(("train", "val"), tuple)  # of which nothing is read
                others["val_fid"] = False
                cls(**splits, reference=reference, weights=weights, **options, **others)
        else:
            if reference not in SPLITS:
                images_at(reference, key=KEY)
            if not callable(weights):
                extractor = build_extractor(others.get("extractor", INCEPTION), [], weights=weights)
                if others.get("sfid"):
                    SpatialFeatures(extractor)
            _check_numbers(**{name: options[name] for name in ("isc_splits", "kid_subset_size", "prc_neighborhood")})
        if num is not None:
            _check_enough(num, isc_splits if isc else 0)
            _check_sizes(num, "generated", kid_subset_size if kid else None, prc_neighborhood if prc else None)

    def update(self, images: Tensor, labels: Tensor | None = None, ids: Tensor | None = None) -> None:
        """Adds generated images uint8 [B, 3, H, W]; their labels are not read; ids: `Rows.update`."""
        features = extract(self.extractor, images)
        self.statistics.update(features[self.fid_features])
        if self.spatial is not None:
            self.spatial_statistics.update(self.spatial.take())
        if self.logits is not None:
            self.logits.update(features[self.isc_features], ids)
        if self.features is not None:
            self.features.update(features[self.fid_features], ids)

    def compute(self) -> dict[str, float]:
        """The scores of all images given since the last `reset`, over all ranks; every rank must call it.

        Raises:
            UserError: too few images for a covariance, `isc_splits`, `kid_subset_size` or `prc_neighborhood`.
        """
        sums = self.statistics.compute()
        n, statistics = int(sums["n"]), as_numpy(sums)
        _check_enough(n, 0 if self.logits is None else self.isc_splits)
        self._check_sizes(n, "generated")
        scores = {"fid": frechet_distance(statistics, self.reference), "fid_samples": n}
        if self.spatial is not None:
            own = as_numpy(self.spatial_statistics.compute())
            scores |= {"sfid": frechet_distance(own, self.spatial_reference), "sfid_samples": n}
        if self.logits is not None:
            isc = isc_features_to_metric(self.logits.gathered().cpu(), splits=self.isc_splits)
            scores |= {"isc_mean": isc[KEY_METRIC_ISC_MEAN], "isc_std": isc[KEY_METRIC_ISC_STD]}
        if self.features is not None:
            features = self.features.gathered()
            if self.kid is not None:
                kid = kid_features_to_metric(features, self.real_features, verbose=False, **self.kid)
                scores |= {"kid_mean": kid[KEY_METRIC_KID_MEAN], "kid_std": kid[KEY_METRIC_KID_STD]}
            if self.prc is not None:
                # In parts, as all distances of 50 000 images to as many would be 10 GB.
                options = {"save_cpu_ram": True, "verbose": False, **self.prc}
                with torch.autocast(features.device.type, enabled=False):
                    prc = prc_features_to_metric(features, self.real_features, **options)
                keys = {"precision": KEY_METRIC_PRECISION, "recall": KEY_METRIC_RECALL, "f_score": KEY_METRIC_F_SCORE}
                scores |= {name: prc[key] for name, key in keys.items()}
        if self.val_fid is not None:
            scores["fid_val"] = self.val_fid
        return scores

    def reset(self) -> None:
        """Forgets the generated images; the reference stays."""
        for state in (self.statistics, self.spatial_statistics, self.logits, self.features):
            if state is not None:
                state.reset()

    def _check_sizes(self, n: int, which: str) -> None:
        subset = None if self.kid is None else self.kid["kid_subset_size"]
        _check_sizes(n, which, subset, None if self.prc is None else self.prc["prc_neighborhood"])

    def _split_features(self, split: Split, name: str) -> Tensor:
        """Features of a whole split, float32 [N, width]."""
        return torch.cat(
            [extract(self.extractor, batch)[self.fid_features] for batch in image_batches(split, name=name)]
        )

    def _split_statistics(
        self, split: Split, name: str, cache_dir: str | Path | None, *, spatial: bool = False
    ) -> Statistics:
        """Statistics of a whole split, out of the cache where it has them."""

        def features(images: Tensor) -> Tensor:
            extracted = extract(self.extractor, images)
            return self.spatial.take() if spatial else extracted[self.fid_features]

        which = "spatial" if spatial else self.fid_features
        identity = hashlib.sha256(f"{self.extractor.get_name()} {which}".encode())
        for parameter, value in sorted(self.extractor.state_dict().items()):
            identity.update(parameter.encode())
            identity.update(value.cpu().numpy().tobytes())
        return split_statistics(
            lambda: image_batches(split, name=name),
            features,
            like=self.spatial_statistics if spatial else self.statistics,
            identity=identity.hexdigest(),
            cache_dir=cache_dir,
            score="fid",
            name=name,
        )


def _check_real(key: str | None, reference: str | Path) -> None:
    """Whether `reference` has the real images that `kid` or `prc` needs."""
    if key is not None and reference not in SPLITS and not is_folder(reference) and not holds_images(reference):
        raise UserError(
            f"scores.fid.{key} compares with real images, which scores.fid.reference={reference} does not hold: give a "
            "split (train, val), a folder of images or an npz with arr_0, or leave it out"
        )


def _has_statistics(reference: str | Path, names: tuple[str, str]) -> bool:
    """Whether they are read from a file; else they are computed of its images, of a folder's or of a split's."""
    if reference in SPLITS or is_folder(reference):
        return False
    if not holds_images(reference):
        return True  # or should have: `load_statistics` says what is wrong
    with zipfile.ZipFile(reference) as archive:
        return {f"{name}.npy" for name in names} <= set(archive.namelist())


def _check_numbers(**numbers: int) -> None:
    for key, value in numbers.items():
        least = 2 if key == "kid_subset_size" else 1
        if value < least:
            raise UserError(f"scores.fid.{key} must be at least {least}, got {value}")


def _check_enough(n: int, isc_splits: int) -> None:
    if n < (least := max(2, isc_splits)):
        raise UserError(f"scores.fid needs at least {least} images (2, and scores.fid.isc_splits), got {n}")


def _check_sizes(n: int, which: str, subset: int | None, neighborhood: int | None) -> None:
    if subset is not None and n < subset:
        raise UserError(f"scores.fid.kid_subset_size={subset} is more than there are {which} images: {n}")
    if neighborhood is not None and n <= neighborhood:
        raise UserError(f"scores.fid.prc_neighborhood={neighborhood} needs more {which} images than {n}")


def split_statistics(
    batches: Callable[[], Iterable[Tensor]],
    features: Callable[[Tensor], Tensor],
    *,
    like: FeatureStatistics,
    identity: str,
    cache_dir: str | Path | None,
    score: str,
    name: str,
) -> Statistics:
    """Statistics of the features of a whole split, which every rank sees whole; out of the cache where it has them.

    Args:
        batches: reads the split: images or clips, uint8 [B, ...].
        features: images or clips -> float [B, width].
        like: statistics of the same features, whose width and device these have.
        identity: of the features, in the cache.
        cache_dir: None: no cache.
        score: the score's key.
        name: of the split.

    Raises:
        UserError: the split has fewer than two of them, or the cache is damaged.
    """
    path, width = None, len(like.sum)
    if cache_dir is not None:
        key = hashlib.sha256(f"{identity} {image_digest(batches())}".encode())
        path = Path(cache_dir) / f"{score}-statistics-{key.hexdigest()[:16]}.npz"
        if path.is_file():
            return load_statistics(path, width, score=score)
    sums = FeatureStatistics(width, over_ranks=False).to(like.sum.device)
    for batch in batches():
        sums.update(features(batch))
    if sums.n < 2:
        raise UserError(f"scores.{score}.reference: the {name} split needs at least 2 images")
    statistics: Any = as_numpy(sums.compute())
    if path is not None:
        write_cached(path, lambda temporary: np.savez(temporary, **statistics))
    return statistics


def load_statistics(
    path: str | Path, width: int | None, *, score: str = "fid", names: tuple[str, str] = POOLED
) -> Statistics:
    """Reads `mu` and `sigma` of an npz (other members are left unread) as float64.

    Args:
        width: the number of features; None: not known yet, so that only the file is looked at.
        score: the score's key, for messages.
        names: of the two in the npz.

    Raises:
        UserError: no such file, not an npz, or statistics that are missing, not finite or not of `width` features.
    """
    key = f"scores.{score}.reference"
    if not path or not Path(path).is_file():
        raise UserError(f"{key}: no such file: {path} (an npz, a folder of images, or the split `train` or `val`)")
    statistics = {}
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {member.filename: member.file_size for member in archive.infolist()}
        with np.load(path, allow_pickle=False) as arrays:
            first = f"{names[0]}.npy"
            if width is None and first in sizes:
                if not 0 < sizes[first] <= 2**20:
                    raise UserError(f"{key}: mu of {path} has {sizes[first]} bytes, where features have a few each")
                width = arrays[names[0]].size
            shapes: Any = (width,), (width, width)
            for name, known, shape in zip(names, POOLED, shapes):
                if f"{name}.npy" not in sizes:
                    raise UserError(f"{key}: {path} has no {name}: an npz with {' and '.join(names)} is needed")
                # Looked at before anything is unpacked: a small file may claim a huge array.
                if sizes[f"{name}.npy"] > 16 * np.prod(shape) + 4096:
                    raise UserError(f"{key}: {name} of {path} is larger than the extractor's {width} features")
                array = arrays[name]
                if array.shape != shape:
                    raise UserError(
                        f"{key}: {name} of {path} is of shape {list(array.shape)}, the extractor's is {list(shape)}"
                    )
                if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
                    raise UserError(f"{key}: {name} of {path} has values that are not finite numbers")
                statistics[known] = array.astype(np.float64)
    except (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{key}: {path} is not a readable npz ({type(error).__name__}): write it again") from error
    return statistics


def default_features(extractor: str, metric: str) -> str:
    if extractor not in FEATURE_EXTRACTORS_REGISTRY:
        build_extractor(extractor, [])  # says which there are
    try:
        return FEATURE_EXTRACTORS_REGISTRY[extractor].get_default_feature_layer_for_metric(metric)
    except KeyError:
        raise UserError(f"scores.fid.extractor: {extractor} has no features for {metric}; choose another") from None


def as_numpy(sums: dict[str, Tensor]) -> Statistics:
    """What `FeatureStatistics.compute` gives, on the CPU."""
    mu = sums["mu"].reshape(-1)
    return {"mu": mu.cpu().numpy(), "sigma": sums["sigma"].reshape(len(mu), len(mu)).cpu().numpy()}


def frechet_distance(generated: Statistics, reference: Statistics) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 sqrt(sigma1 sigma2)), by torch-fidelity."""
    return fid_statistics_to_metric(generated, reference, verbose=False)[KEY_METRIC_FID]
