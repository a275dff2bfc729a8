"""What is known of scores before anything is sampled is told then."""

import functools

import numpy as np
import pytest

from grn.evaluation.scoring import check_num, check_scores
from grn.metrics.fid import GenerationScores
from grn.metrics.fvd import FrechetVideoDistance
from grn.metrics.nearest import NearestTrainingDistance
from grn.metrics.video_networks import video_network
from grn.runtime.errors import UserError
from grn.toys.digits_classifier import digits_classifier_weights
from grn.toys.motion_judge import MovingDigitsJudge
from grn.toys.pair_judge import DigitPairsJudge

DIGITS = {"extractor": "digits-classifier", "weights": digits_classifier_weights, "reference": "train"}


def check(score, num=1000, **settings):
    check_scores({"it": functools.partial(score, **settings)}, num)


@pytest.mark.parametrize(
    ("settings", "num", "message"),
    [
        ({"reference": "/nope/stats.npz"}, 1000, r"scores\.fid\.reference: no such file: /nope/stats\.npz"),
        ({"reference": "/nope/stats.npz", "kid": True}, 1000, r"scores\.fid\.kid compares with real images"),
        ({"kid": True}, 20, r"kid_subset_size=1000 is more than there are generated images: 20"),
        ({"prc": True, "isc": False}, 3, r"prc_neighborhood=3 needs more generated images than 3"),
        ({"isc_splits": 10}, 9, r"scores\.fid needs at least 10 images"),
        ({"isc": False}, 1, r"scores\.fid needs at least 2 images"),
        ({"kid": True, "kid_subset_size": 1}, 20, r"scores\.fid\.kid_subset_size must be at least 2"),
        ({"weights": "/nope.pth"}, 1000, r"scores\.fid\.weights: no such file: /nope\.pth"),
        ({"extractor": "inceptoin", "weights": None}, 1000, r"scores\.fid\.extractor: 'inceptoin'"),
    ],
)
def test_fid(settings, num, message):
    with pytest.raises(UserError, match=message) as told:
        check(GenerationScores, num, **DIGITS | settings)
    assert "\n" not in str(told.value)


def test_statistics_of_another_form(tmp_path):
    np.savez(tmp_path / "odd.npz", mu=np.zeros(4), sigma=np.zeros((4, 3)))
    with pytest.raises(UserError, match=r"sigma of .*odd\.npz is of shape \[4, 3\]"):
        check(GenerationScores, **DIGITS | {"reference": str(tmp_path / "odd.npz")})
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2**18), sigma=np.zeros((4, 4)))
    with pytest.raises(UserError, match=r"mu of .*wide\.npz has \d+ bytes"):
        check(GenerationScores, **DIGITS | {"reference": str(tmp_path / "wide.npz")})
    np.savez(tmp_path / "good.npz", mu=np.zeros(4), sigma=np.eye(4))
    check(GenerationScores, **DIGITS | {"reference": str(tmp_path / "good.npz")})


def test_others():
    check(GenerationScores, **DIGITS, kid=True)
    check(NearestTrainingDistance)
    with pytest.raises(UserError, match=r"scores\.fvd\.network\.path: no file /nope\.pt"):
        check(FrechetVideoDistance, network=functools.partial(video_network, path="/nope.pt"))
    with pytest.raises(UserError, match="no pair of digits"):
        check(DigitPairsJudge, prompts=["a cat"])
    with pytest.raises(UserError, match="no digit that moves"):
        check(MovingDigitsJudge, prompts=["a cat"])
    with pytest.raises(UserError, match=r"callbacks\.scores\.num=15 is not a multiple of the 10 classes"):
        check_num(15, 10, key="callbacks.scores.num")
