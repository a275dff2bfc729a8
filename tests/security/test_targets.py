"""What the config of a checkpoint may build: nothing but what is listed for its group."""

import importlib
import inspect
import pkgutil

import pytest
from checkpoints import MODEL, contents, saved
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import grn
from grn.checkpoints.native import load_tokenizer, read_checkpoint, restore_tokenizer
from grn.checkpoints.trust import GROUPS, check_group, named_files
from grn.runtime.config_folder import CONF
from grn.runtime.errors import UserError

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OPTIONS = [(group.name, option.stem) for group in CONF.iterdir() if group.is_dir() for option in group.glob("*.yaml")]


def places():
    """(Group, what may stand there, a config of the group with `node` there) of every place that may be built."""

    def walk(name, group, wrap):
        yield name, group, wrap
        for key, part in group.parts.items():
            key = "x" if key == "*" else key
            bases = [{"_target_": target} | ({"_partial_": True} if group.partial else {}) for target in group.targets]
            base = next(base for base in bases or [{}] if passes(name, wrap({**base, key: None})))
            yield from walk(name, part, lambda node, key=key, base=base, wrap=wrap: wrap({**base, key: node}))

    for name, group in GROUPS.items():
        yield from walk(name, group, lambda node: node)


def passes(name, config):
    try:
        check_group(name, config, "x")
    except UserError:
        return False
    return True


@pytest.fixture(scope="module")
def everything():
    """The dotted names of all classes and functions that can be reached in the package, wherever they are from."""
    names = set()
    for found in pkgutil.walk_packages(grn.__path__, "grn."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        names |= {f"{found.name}.{name}" for name, it in vars(module).items() if callable(it)}
    return names


def test_no_class_or_function_of_the_package_is_built_unless_it_is_listed(everything):
    assert len(everything) > 1000
    listed = 0
    for name, group, wrap in places():
        assert set(group.targets) <= everything, "a name in the list that is none"
        for number, target in enumerate(sorted(everything - set(group.targets))):
            for partial in ({}, {"_partial_": True})[: 2 if number % 8 == 0 else 1]:  # what is called decides
                with pytest.raises(UserError, match="no part of GRN"):
                    check_group(name, wrap({"_target_": target, **partial}), "x")
        for target in group.targets:
            assert passes(name, wrap({"_target_": target} | ({"_partial_": True} if group.partial else {})))
            assert not passes(name, wrap({"_target_": target} | ({} if group.partial else {"_partial_": True})))
            assert inspect.isclass(find(target)) or group.partial
        listed += len(group.targets)
    assert listed > 30


def find(target):
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_checkpoints_of_every_experiment_are_read(name):
    given = [] if "tokenizer" in name else ["tokenizer.ckpt=somewhere"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", [f"+experiment={name}", *given]), resolve=True)
    for group in ("model", "text_encoder", "training", "sampler", "data", "scores"):
        check_group(group, config[group], "x")
    if config["tokenizer"]["model"] is not None:
        check_group("tokenizer.model", config["tokenizer"]["model"], "x")


MISSING = {
    "tokens": ["root"],
    "captioned_tokens": ["root"],
    "captioned_image_and_video_tokens": ["parts.images.root", "parts.clips.root"],
    "t5": ["path"],
}


@pytest.mark.parametrize(
    ("group", "option"), [it for it in sorted(OPTIONS) if it[0] in GROUPS and it[1] not in ("checkpoint", "calibrated")]
)
def test_every_option_of_a_group_may_come_back_from_a_checkpoint(group, option):
    given = ["tokenizer.ckpt=x", "name=x", f"{group}={option}"]
    given += ["training=text_refiner"] if group == "scores" and "t2" in option else []
    given += [f"{group}.{key}=somewhere" for key in MISSING.get(option, [])]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", given)
        check_group(group, OmegaConf.to_container(config[group], resolve=True), "x")


HOSTILE = {"_target_": "grn.runtime.files.write_text", "_partial_": True, "path": "x", "text": "y"}
EVIL = {
    "_target_": "grn.metrics.fvd.FrechetVideoDistance",
    "train": None,
    "val": None,
    "network": HOSTILE,
}


@pytest.mark.parametrize(
    ("place", "node"),
    [
        (("model", "evil"), EVIL),
        (("model", "weights"), HOSTILE),
        (("model", "weights"), [({"x": HOSTILE},)]),
        (("model", "temporal"), [HOSTILE]),
        (("training", "network"), HOSTILE),
        (("training", "evil"), EVIL),
        (("training", "perceptual"), {"_target_": "os.system", "command": "touch x"}),
        (("sampler",), {"_target_": "grn.method.sampler.Sampler", "schedule": HOSTILE}),
        (("sampler",), {"_target_": "grn.metrics.video_networks.video_network", "path": "evil.pt"}),
        (("text_encoder",), {"_target_": "grn.networks.text_encoder._load"}),
        (("text_encoder",), {"_target_": "grn.networks.text_encoder.ByteT5", "_args_": [1]}),
        (("model", "_partial_"), True),
        (("model", "_recursive_"), False),
        (("model", "unknown"), 1),
        (("model", "_target_"), ["grn.networks.tokenizer.HBQTokenizer"]),
        (("model", "_target_"), "grn.networks.tokenizer"),
        (("model", "_target_"), ""),
        (("model",), {"latent_channels": 2}),
        (("model",), None),
        (("model",), [MODEL]),
        (("training",), "grn.training.TokenizerModule"),
        (("training",), {"_target_": "grn.training.TokenizerModule", "weights": "${model.evil}"}),
        (("name",), "${oc.env:HOME}"),
    ],
)
def test_nothing_else_is_built(place, node, tmp_path, monkeypatch):
    """Whoever reads it: for itself, or as the tokenizer within a refiner's."""
    monkeypatch.chdir(tmp_path)
    config = contents()["config"]
    within = config
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = node
    run = saved(tmp_path, config=config)
    for read in (read_checkpoint, load_tokenizer):
        with pytest.raises(UserError) as told:
            read(run)
        line = str(told.value)
        assert str(run) in line
        assert "\n" not in line
        assert len(line) < 500
    if place[0] == "model":
        record = {"model": config["model"], "official": False, "path": "x", "ema": None, "step": 1, "sha256": "x"}
        with pytest.raises(UserError):
            read_checkpoint(saved(tmp_path, tokenizer={**record, "state_dict": {}}))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_not_built_may_name_anything(tmp_path):
    """Loggers, callbacks, scores and data are data: a run with classes of its own can be sampled without them."""
    config = contents()["config"]
    config |= {key: {"x": {"_target_": "mine.Thing", "_partial_": True}} for key in ("logger", "callbacks", "scores")}
    config["data"] = {"_target_": "mine.Data"}
    tokenizer, record = load_tokenizer(saved(tmp_path, config=config))
    assert restore_tokenizer(record).state_dict().keys() == tokenizer.state_dict().keys()


def test_scores_of_a_checkpoint_name_their_files():
    fvd = {"_target_": "grn.metrics.fvd.FrechetVideoDistance", "_partial_": True, "reference": "train"}
    network = {"_target_": "grn.metrics.video_networks.video_network", "_partial_": True, "path": "evil.pt"}
    fid = {"_target_": "grn.metrics.fid.GenerationScores", "_partial_": True, "reference": "x.npz", "weights": None}
    scores = {"fvd": {**fvd, "network": network}, "fid": fid}
    check_group("scores", scores, "x")
    assert named_files("scores", scores) == {"scores.fvd.network.path": "evil.pt", "scores.fid.reference": "x.npz"}
    for odd in ({"fvd": {**fvd, "_partial_": False}}, {"fvd": {**fvd, "device": "meta"}}, {"fvd": network}):
        with pytest.raises(UserError):
            check_group("scores", odd, "x")


def test_a_package_of_ones_own_needs_trust(tmp_path, monkeypatch):
    own = {"_target_": "mine.Network", "depth": 2, "inner": {"_target_": "mine.Inner"}}
    with pytest.raises(UserError, match=r"model wants to call 'mine\.Network'.*if you trust the file.*GRN_TRUST=mine"):
        check_group("model", own, "x")
    monkeypatch.setenv("GRN_TRUST", "other,mine")
    check_group("model", own, "x")
    check_group("model", {**MODEL, "temporal": [{"_target_": "mine.Inner"}]}, "x")
    with pytest.raises(UserError, match="no part of GRN"):
        check_group("model", {**own, "inner": HOSTILE}, "x")


@pytest.mark.parametrize("config", [["junk"], None, "x", 3])
def test_a_config_that_is_none(config, tmp_path):
    with pytest.raises(UserError, match="not a checkpoint of GRN"):
        read_checkpoint(saved(tmp_path, config=config))


def test_a_checkpoint_of_an_earlier_layout_is_told_in_one_line():
    sampler = {"_target_": "grn.sampler.Sampler", "schedule": {"_target_": "grn.sampler.Linear"}}
    with pytest.raises(UserError, match=r"^last\.ckpt: sampler is grn\.sampler\.Sampler, of an earlier layout of GRN"):
        check_group("sampler", sampler, "last.ckpt")
