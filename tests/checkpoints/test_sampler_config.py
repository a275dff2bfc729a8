import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from grn.checkpoints.sampler_config import MAX_BYTES, build_sampler, read_sampler, sampler_config, write_sampler
from grn.method.sampler import Sampler
from grn.method.schedules import Cosine, EntropyGuided, Linear
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError
from grn.runtime.failures import explain

SAMPLERS = [
    Sampler(),
    Sampler(Cosine(7), temperature=1.25),
    Sampler(EntropyGuided(3, 150.1234567890123, -76.6, 12, 30), 1.3, 2.35, (0.44, 1.0)),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s.schedule).__name__)
def test_a_sampler_comes_back(sampler, tmp_path):
    path = write_sampler(tmp_path / "sampler.yaml", sampler, "where it is from\nand when")
    assert path.read_text().startswith("# where it is from\n# and when\n")
    assert sampler_config(read_sampler(path)) == sampler_config(sampler)
    assert sampler_config(build_sampler(OmegaConf.load(path))) == sampler_config(sampler)  # as a config group's choice


def composed(verb, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(verb, ["sampler=calibrated", *overrides])


def test_it_is_found_beside_the_checkpoint(tmp_path):
    write_sampler(tmp_path / "calibration" / "sampler.yaml", SAMPLERS[2], "")
    (tmp_path / "checkpoints").mkdir()
    for verb in ("sample", "evaluate", "export"):
        for ckpt in (tmp_path, tmp_path / "checkpoints" / "best.ckpt"):
            sampler = build_sampler(composed(verb, f"ckpt={ckpt}").sampler, Sampler(Linear(9), guidance=4.0))
            assert sampler_config(sampler) == sampler_config(SAMPLERS[2])
    hotter = build_sampler(composed("sample", f"ckpt={tmp_path}", "sampler.temperature=2").sampler)
    assert (hotter.temperature, hotter.schedule) == (2, SAMPLERS[2].schedule)


def test_a_trained_config_holds_its_values(tmp_path):
    path = write_sampler(tmp_path / "sampler.yaml", SAMPLERS[2], "")
    resolved = OmegaConf.to_container(composed("train", f"sampler.file={path}").sampler, resolve=True)
    path.unlink()
    assert sampler_config(build_sampler(resolved)) == sampler_config(SAMPLERS[2])


def test_a_missing_file_takes_one_line(tmp_path):
    with pytest.raises(Exception, match=r"sampler\.file") as error:
        build_sampler(composed("sample", f"ckpt={tmp_path}").sampler)
    line = explain(error.value)
    assert line == (
        f"sampler.file: there is no {tmp_path}/calibration/sampler.yaml; python -m grn.calibrate ckpt=... writes one"
    )


GOOD = sampler_config(SAMPLERS[2])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- 1",
        b"schedule: 5",
        b"\xff\xfe\x00",
        b"{" * 40_000,
        b"a: " + b"x" * MAX_BYTES,
        b"schedule: !!python/object/apply:os.system ['touch gone']",
        yaml.safe_dump(GOOD | {"schedule": {"_target_": "os.system", "command": "touch gone"}}).encode(),
        yaml.safe_dump(GOOD | {"schedule": GOOD["schedule"] | {"max_steps": 10**12}}).encode(),
        yaml.safe_dump(GOOD | {"schedule": GOOD["schedule"] | {"scale": "${oc.env:HOME}"}}).encode(),
        yaml.safe_dump(GOOD | {"temperature": -1.0}).encode(),
        yaml.safe_dump(GOOD | {"callback": 1}).encode(),
    ],
)
def test_foreign_files_are_refused(content, tmp_path):
    path = tmp_path / "sampler.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"sampler\.yaml") as error:
        read_sampler(path)
    assert "\n" not in str(error.value)
