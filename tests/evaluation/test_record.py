"""Which folder results go into, and what tells them apart."""

import json

import pytest
import torch

from grn.evaluation.record import folder_for, provenance, settings
from grn.metrics.headlines import headlines
from grn.metrics.intervals import of_mean, of_share
from grn.runtime.errors import UserError
from grn.runtime.git import package_commit


def wanted(**more):
    return settings(
        ckpt="a.ckpt", num=10, seed=1, sampler={"temperature": 1.0}, data={"num_workers": 2, "root": "d"}, **more
    )


def written(out, content):
    out.mkdir(exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(content))


def test_other_settings_do_not_overwrite(tmp_path):
    out = tmp_path / "evaluation"
    assert folder_for(out, wanted(), given=False, overwrite=False) == out
    written(out, {"settings": wanted(), "metrics": {}})
    assert folder_for(out, wanted(), given=True, overwrite=False) == out
    other = wanted() | {"sampler": {"temperature": 1.2}}
    beside = folder_for(out, other, given=False, overwrite=False)
    assert beside.parent == tmp_path
    assert beside.name.startswith("evaluation-")
    assert beside == folder_for(out, other, given=False, overwrite=False)
    assert beside != folder_for(out, wanted() | {"seed": 2}, given=False, overwrite=False)
    with pytest.raises(UserError, match=r"\(sampler\.temperature=1\.0, here 1\.2\): give another out=.*overwrite=true"):
        folder_for(out, other, given=True, overwrite=False)
    assert folder_for(out, other, given=True, overwrite=True) == out


def test_results_of_before_settings_were_recorded(tmp_path):
    written(tmp_path, {"num": 10, "seed": 1, "sampler": "Sampler()", "metrics": {}})
    assert folder_for(tmp_path, wanted(), given=True, overwrite=False) == tmp_path
    with pytest.raises(UserError, match=r"seed=1, here 2"):
        folder_for(tmp_path, wanted() | {"seed": 2}, given=True, overwrite=False)
    (tmp_path / "metrics.json").write_text("[1")
    assert folder_for(tmp_path, wanted(), given=True, overwrite=False) == tmp_path


def test_settings_are_plain_short_and_hold_no_secret():
    found = wanted(scores={"judge": {"prompts": ["a", "b"]}}, url="https://u:p@host/x.tar?key=1")
    assert json.loads(json.dumps(found)) == found
    assert found["data"] == {"root": "d"}
    assert found["scores"]["judge"]["prompts"].startswith("2 of sha256 ")
    assert "key=1" not in found["url"]
    assert "u:p" not in found["url"]
    assert found["scores"] != wanted(scores={"judge": {"prompts": ["b", "a"]}})["scores"]


def test_provenance_tells_weights_apart():
    network = torch.nn.Linear(2, 2)
    before = provenance(network)
    assert before == provenance(network)
    assert {"python", "torch", "transformers"} <= before["versions"].keys()
    with torch.no_grad():
        network.weight[0, 0] += 1
    assert provenance(network)["weights_sha256"] != before["weights_sha256"]
    assert before["git"] == package_commit()


def test_the_console_has_five_rows_that_matter():
    metrics = {f"judge_accuracy_{n}": 1.0 for n in range(10)} | {"steps_mean": 14.5, "steps_min": 3, "nn_ratio": 1.0}
    metrics |= {
        "seconds": 2.0,
        "judge_accuracy": 0.99,
        "fid": 11.25,
        "fid_samples": 1000,
        "isc_std": 0.1,
        "isc_mean": 9,
    }
    assert headlines(metrics) == {
        "fid": "11.2500 of 1000 samples",
        "judge_accuracy": "0.9900",
        "isc_mean": "9",
        "steps_mean": "14.5000",
        "nn_ratio": "1.0000",
    }
    assert list(headlines({"b": 1.0, "a": 2.0})) == ["b", "a"]


def test_intervals():
    # Wilson's interval of 8 of 10: [0.490162, 0.943318], by the formula of statsmodels' proportion_confint.
    assert of_share(8, 10) == pytest.approx((0.943318 - 0.490162) / 2, abs=1e-5)
    assert of_share(10, 10) > 0.1
    assert of_mean([1.0]) is None
    assert of_mean([0.0, 1.0]) == pytest.approx(1.959964 * 0.5)
