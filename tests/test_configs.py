"""Every experiment on every cluster: composes, resolves, instantiates on the meta device."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_method, instantiate
from lightning import Callback
from omegaconf import OmegaConf

from grn.callbacks import EMA
from grn.checkpoints.native import build_network
from grn.checkpoints.sampler_config import build_sampler
from grn.data.text_videos import TextVideoDataModule
from grn.method.sampler import Sampler
from grn.method.schedules import EntropyGuided, Shifted
from grn.runtime.config_folder import CONF, top_level_keys

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
CLUSTERS = sorted(path.stem for path in (CONF / "cluster").glob("*.yaml") if path.stem != "none")


def composed(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


def experiment(name, *overrides):
    given = [] if "tokenizer" in name else ["tokenizer.ckpt=somewhere"]
    return composed("train", f"+experiment={name}", *given, *overrides)


# Each experiment, and each cluster, at least once; make test-full has each experiment sharded and as a job.
LONGER = max(len(EXPERIMENTS), len(CLUSTERS))
PAIRED = {(EXPERIMENTS[i % len(EXPERIMENTS)], CLUSTERS[i % len(CLUSTERS)]) for i in range(LONGER)}
PAIRS = [
    pytest.param(name, cluster, marks=[] if (name, cluster) in PAIRED else pytest.mark.full)
    for name in EXPERIMENTS
    for cluster in CLUSTERS
    if (name, cluster) in PAIRED or cluster in ("fsdp", "slurm_1x8")
]


@pytest.mark.parametrize(("name", "cluster"), PAIRS)
def test_every_experiment_on_every_cluster(name, cluster, tmp_path):
    own = {"image_folder_c2i": ["data.image_size=64", "data.num_labels=10"]}  # which else a manifest tells
    config = experiment(name, f"cluster={cluster}", f"paths.runs={tmp_path}", *own.get(name, ()))
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert set(resolved) <= top_level_keys("train")
    assert resolved["name"] == name
    with torch.device("meta"):
        network = build_network(config.model)
    assert all(p.is_meta for p in network.parameters())
    assert isinstance(build_sampler(config.sampler), Sampler)
    callbacks = [instantiate(callback) for callback in config.callbacks.values()]
    assert all(isinstance(callback, Callback) for callback in callbacks)
    assert any(isinstance(callback, EMA) for callback in callbacks)
    assert resolved["trainer"]["devices"] == resolved["cluster"]["devices"]


@pytest.mark.parametrize(
    ("name", "depth", "width", "heads", "bottleneck", "context_start"),
    [  # the table of docs/method.md#class-conditional-refiner
        ("c2i_ind_B", 12, 768, 12, 128, 4),
        ("c2i_ind_L", 24, 1024, 16, 128, 8),
        ("c2i_ind_H", 32, 1280, 16, 256, 10),
        ("c2i_ind_G", 40, 1664, 16, 256, 10),
        ("c2i_bit_B", 12, 768, 12, 128, 4),
    ],
)
def test_reference_sizes_and_hyperparameters(name, depth, width, heads, bottleneck, context_start):
    config = experiment(name)
    model = config.model
    assert (model.depth, model.width, model.heads) == (depth, width, heads)
    assert (model.bottleneck, model.context_start, model.context_tokens) == (bottleneck, context_start, 32)
    assert (model.channels, model.classes) == ((64, 2) if "bit" in name else (16, 16))
    assert (model.size, model.num_labels) == (16, 1000)
    assert config.data.batch_size == 1024
    assert config.trainer.max_steps == round(600 * 1281167 / 1024)
    training = config.training
    assert training.learning_rate == pytest.approx(5e-5 * 1024 / 256)
    assert training.warmup_steps == round(5 * 1281167 / 1024)
    assert (training.lr_schedule, training.gradient_clip, training.label_dropout) == ("constant", 0.1, 0.1)
    assert (list(training.betas), training.weight_decay) == ([0.9, 0.95], 0.0)
    assert (training.signal_ratio_mean, training.signal_ratio_std) == (-0.8, 0.8)
    assert (list(config.callbacks.ema.decays), config.callbacks.ema.use) == ([0.9999, 0.9996], 0.9999)
    assert config.callbacks.scores.num == 50_000
    sampler = build_sampler(config.sampler)
    if name == "c2i_ind_B":
        assert (sampler.temperature, sampler.guidance, tuple(sampler.guidance_interval)) == (1.31, 2.35, (0.44, 1.0))
    if name == "c2i_ind_L":
        assert (sampler.temperature, sampler.guidance, tuple(sampler.guidance_interval)) == (1.3, 2.0, (0.42, 1.0))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "c2i_ind_B" else pytest.mark.full)
        for name in EXPERIMENTS
        if name.startswith("c2i")
    ],
)
def test_rates_and_epochs_follow_the_global_batch(name):
    """5e-5 at 256; accumulated batches are one."""
    for batch, accumulated, rate in ((256, 1, 5e-5), (512, 1, 1e-4), (64, 4, 5e-5), (1024, 2, 4e-4)):
        config = experiment(name, f"data.batch_size={batch}", f"trainer.accumulate_grad_batches={accumulated}")
        assert config.training.learning_rate == pytest.approx(rate)
        assert config.trainer.max_steps == round(600 * 1281167 / (batch * accumulated))
        assert config.training.warmup_steps == round(5 * 1281167 / (batch * accumulated))
    assert experiment(name, "training.learning_rate=1e-3").training.learning_rate == 1e-3


def test_samples_of_packs_weigh_as_in_the_authors_newer_script():
    powers = {name: experiment(name).training.sample_weight_power for name in ("t2i_2B", "t2v_2B", "t2v_8B")}
    assert powers == {"t2i_2B": 0.5, "t2v_2B": 0.5, "t2v_8B": 0.5}
    assert composed("train", "training=text_refiner").training.sample_weight_power == 0


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if "t2i" in name or "t2v" in name])
def test_text_experiments_sample_what_they_train_on(name):
    own = {"captions_t2i": ["data.resolutions=[[64,64]]"]}  # which else are those of the prepared pictures
    config = experiment(name, *own.get(name, ()))
    if config.data.name.endswith("_tokens"):  # of these pixels
        config = experiment(name, f"data={config.data.name.removesuffix('_tokens')}")
    data, asked = instantiate(config.data), config.training
    parts = getattr(data, "parts", {"": data}).values()
    if asked.frames > 1:
        parts = [part for part in parts if isinstance(part, TextVideoDataModule)]
        assert all((asked.frames - 1) % part.bucket_frames == 0 for part in parts)
        assert max(part.max_frames for part in parts) >= asked.frames
    trained = {size for part in parts for _, sizes in part.budgets for _, size in sizes}
    assert tuple(asked.size) in trained


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_opens_with_its_facts(name):
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    facts = [line.split(":")[0] for line in lines[1:6]]
    assert facts == ["# Trains", "# After", "# Should reach", "# Takes", "# Command"]


@pytest.mark.parametrize("debug", sorted(path.stem for path in (CONF / "debug").glob("*.yaml")))
@pytest.mark.parametrize("name", ["digits_tokenizer", "t2i_2B"])
def test_debugging_of_every_kind(name, debug):
    config = experiment(name, f"+debug={debug}")
    assert OmegaConf.to_container(config, resolve=True, throw_on_missing=True)["name"] == name


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_commands_resolve_their_config(command):
    config = composed(command, "ckpt=runs/digits_c2i/checkpoints/best.ckpt", "sampler=entropy")
    assert OmegaConf.to_container(config, resolve=True)["out"].startswith("runs/digits_c2i/")


def test_prepare_finds_the_source_of_its_data():
    config = composed("prepare", "data=digits")
    assert get_method(config.source._target_)
    assert config.data.root.endswith("digits")


@pytest.mark.parametrize("option", ["linear", "cosine", "shifted", "entropy"])
def test_every_sampler_fills_its_nulls(option):
    chosen = composed("sample", "ckpt=x", f"sampler={option}").sampler
    alone = build_sampler(chosen)
    assert (alone.temperature, alone.guidance) == (1.0, 1.0)
    trained = {
        "schedule": {"_target_": "grn.method.schedules.EntropyGuided", "warmup": 2, "scale": 9.0, "min_steps": 7},
        "temperature": 1.3,
        "guidance": 2.0,
    }
    beside = build_sampler(chosen, trained)
    assert (beside.temperature, beside.guidance) == (1.3, 2.0)
    if option == "entropy":
        assert (beside.schedule.warmup, beside.schedule.scale, beside.schedule.offset) == (2, 9.0, -620.0)
        assert (alone.schedule.warmup, alone.schedule.scale) == (5, 700.0)
    else:
        assert beside.schedule == alone.schedule


@pytest.mark.parametrize(
    ("kind", "keys", "expected"),
    [
        ("Linear", {"steps": 40}, ("linear", 1.0, 0.999)),
        ("Cosine", {"steps": 40}, ("cosine", 1.0, 0.999)),
        ("Shifted", {"steps": 40, "alpha": 2.0, "cap": 0.95}, ("shifted", 2.0, 0.95)),
        ("EntropyGuided", {"grid": "cosine", "warmup": 2}, ("cosine", 1.0, 0.999)),
    ],
)
def test_adaptive_steps_follow_the_grid_of_the_checkpoint(kind, keys, expected):
    trained = {"schedule": {"_target_": f"grn.method.schedules.{kind}"} | keys}
    schedule = build_sampler(composed("sample", "ckpt=x", "sampler=entropy").sampler, trained).schedule
    assert (schedule.grid, schedule.alpha, schedule.cap) == expected
    asked = composed("sample", "ckpt=x", "sampler=entropy", "sampler.schedule.grid=linear").sampler
    assert build_sampler(asked, trained).schedule.grid == "linear"


@pytest.mark.parametrize("name", ["t2i_2B", "t2v_2B", "t2v_8B"])
def test_text_experiments_follow_the_authors_newer_script(name):
    config = experiment(name)
    sampler = build_sampler(config.sampler)
    assert sampler.schedule == Shifted(50, alpha=1.0, cap=0.95)
    assert (sampler.guidance, sampler.temperature) == (3.0, {"t2i_2B": 1.1, "t2v_2B": 1.0, "t2v_8B": 1.0}[name])
    assert config.training.signal_ratio_input == "realized"
    assert config.model.initialization == "normal"


def test_the_keys_of_the_shifted_schedule():
    chosen = composed("sample", "ckpt=x", "sampler=shifted", "sampler.schedule.cap=0.95", "sampler.schedule.alpha=2")
    assert build_sampler(chosen.sampler).schedule == Shifted(50, alpha=2, cap=0.95)
    chosen = composed("sample", "ckpt=x", "sampler=shifted", "sampler.schedule.steps=30").sampler
    assert build_sampler(chosen).schedule == Shifted(30, alpha=1.0, cap=0.999)
    tuned = Sampler(Shifted(50, alpha=2.0, cap=0.95))  # what the weights were
    assert build_sampler(chosen, tuned).schedule == Shifted(30, alpha=2.0, cap=0.95)
    adaptive = composed("sample", "ckpt=x", "sampler=entropy", "sampler.schedule.grid=shifted").sampler
    assert build_sampler(adaptive, tuned).schedule == EntropyGuided(grid="shifted", alpha=2.0, cap=0.95)


def test_command_line_beats_the_checkpoint():
    chosen = composed("sample", "ckpt=x", "sampler=linear", "sampler.schedule.steps=7", "sampler.temperature=1.1")
    sampler = build_sampler(
        chosen.sampler, {"temperature": 2.0, "schedule": {"_target_": "grn.method.schedules.Linear", "steps": 9}}
    )
    assert (sampler.schedule.steps, sampler.temperature) == (7, 1.1)
    unchanged = build_sampler(
        composed("sample", "ckpt=x").sampler, {"schedule": {"_target_": "grn.method.schedules.Linear", "steps": 9}}
    )
    assert unchanged.schedule.steps == 9


def test_parts_of_a_mixture_share_what_packs_share():
    data = experiment("t2v_2B", "data.max_tokens=20000", "data.num_workers=2").data
    for part in data.parts.values():
        assert (part.max_tokens, part.num_workers, part.batch_size, part.lookahead) == (20000, 2, 32, 16)
    assert data.parts.clips.fps == 16
    assert data.parts.clips.key == "data.parts.clips"
