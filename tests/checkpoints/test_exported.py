"""Folders of exported refiners: whole, ours, and nothing but plain values in them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from grn.checkpoints.exported import FILES, is_exported_refiner, load_exported_refiner, save_exported_refiner
from grn.checkpoints.native import weights_hash
from grn.method.sampler import Sampler
from grn.method.schedules import Cosine, EntropyGuided, Linear, Shifted
from grn.networks.class_refiner import ClassRefiner
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.errors import UserError
from grn.sampling.loading import load_refiner
from grn.weights import pretrained
from grn.weights.kinds import INDEX


def parts(seed=0):
    torch.manual_seed(seed)
    refiner = ClassRefiner(
        channels=3, classes=4, num_labels=5, size=4, depth=2, width=16, heads=2, bottleneck=8, context_start=1,
        context_tokens=2,
    )  # fmt: skip
    for parameter in refiner.parameters():
        nn.init.normal_(parameter, std=0.1)
    tokenizer = HBQTokenizer(
        latent_channels=3, rounds=2, dim=4, decoder_dim=4, multipliers=(1, 2), blocks_per_stage=1, temporal=(False,)
    )
    return {"refiner": refiner, "tokenizer": tokenizer, "labeling": "ind", "sampler": Sampler(Linear(2))}


PROVENANCE = {"refiner": {"step": 12}, "tokenizer": {"step": 5}}


@pytest.fixture
def folder(tmp_path):
    return save_exported_refiner(tmp_path / "run" / "export", **parts(), provenance=PROVENANCE)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(Shifted(7, alpha=2.0), guidance=3.0),
        Sampler(Cosine(7), temperature=1.31, guidance=2.35, guidance_interval=(0.44, 1.0)),
        Sampler(EntropyGuided(warmup=2, scale=9, offset=-1.5, min_steps=3, max_steps=8)),
        Sampler(EntropyGuided(grid="shifted", alpha=2, cap=0.95)),
    ],
    ids=["shifted", "cosine", "entropy", "entropy shifted"],
)
def test_there_and_back(tmp_path, sampler):
    given = parts() | {"sampler": sampler}
    folder = save_exported_refiner(tmp_path / "export", **given, provenance=PROVENANCE)
    assert set(files(folder)) == set(FILES)
    found = load_exported_refiner(str(folder))
    for part in ("refiner", "tokenizer"):
        assert weights_hash(getattr(found, part).state_dict()) == weights_hash(given[part].state_dict())
        assert not getattr(found, part).training
    assert (found.folder, found.labeling, found.step) == (folder, "ind", 12)
    assert (found.sampler.schedule, found.sampler.temperature) == (sampler.schedule, sampler.temperature)
    assert tuple(found.sampler.guidance_interval) == sampler.guidance_interval
    assert files(save_exported_refiner(tmp_path / "b", **given, provenance=PROVENANCE)) == files(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "export"]


def test_only_its_own_is_replaced(folder, tmp_path):
    found = load_exported_refiner(folder)
    before = weights_hash(found.refiner.state_dict())
    save_exported_refiner(folder, **parts(1), provenance=PROVENANCE)
    assert weights_hash(found.refiner.state_dict()) == before  # what was loaded earlier keeps its weights
    assert weights_hash(load_exported_refiner(folder).refiner.state_dict()) != before
    with pytest.raises(UserError, match=r"holds other files \(model_index\.json\)"):
        found.refiner.save_pretrained(folder)
    (folder / "tokenizer" / "notes.txt").write_text("mine")
    for place, words in (
        (folder, "tokenizer holds other files (notes.txt)"),
        (folder / "refiner", "holds other files (config.json)"),
        (folder / INDEX, "is a file"),
        (folder.parent, "holds other files (export)"),
    ):
        assert words in complaint_of(lambda place=place: save_exported_refiner(place, **parts(), provenance=PROVENANCE))
    assert (folder / "tokenizer" / "notes.txt").read_text() == "mine"


def test_a_schedule_that_nobody_else_has(tmp_path):
    class Own(Linear):
        pass

    given = parts() | {"sampler": Sampler(Own(3))}
    message = complaint_of(lambda: save_exported_refiner(tmp_path / "export", **given, provenance=PROVENANCE))
    assert "<locals>.Own, not one of Linear, Cosine, Shifted, EntropyGuided" in message
    assert not (tmp_path / "export").exists()


def complaint_of(load):
    with pytest.raises(UserError) as error:
        load()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def edit(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda index: index.update(_class_name="StableDiffusionPipeline"),
            "is of a StableDiffusion",
        ),
        (lambda index: index.update(_format=2), "is of format 2, this GRN reads 1"),
        (lambda index: index.update(refiner=["os", "system"]), "refiner is os.system, which is no part of GRN; if you"),
        (lambda index: index.update(refiner=["os", "system;1"]), "refiner is ['os', 'system;1'], this GRN reads a"),
        (lambda index: index.update(refiner=["grn.networks.layers", "MLP"]), "this GRN reads a ClassRefiner or"),
        (lambda index: index.update(tokenizer=["os", "system"]), "this GRN reads a HBQTokenizer only"),
        (lambda index: index["sampler"]["schedule"].update(_class_name="os.system"), "set GRN_TRUST=os"),
        (lambda index: index.pop("tokenizer"), "tokenizer is None, this GRN reads a HBQTokenizer only"),
        (lambda index: index.update(labeling=["ind"]), "labeling is ['ind'], not ind or bit"),
        (lambda index: index.update(labeling="bit"), "needs model.channels=6 model.classes=2"),
        (lambda index: index.pop("sampler"), "sampler.schedule is None, not one of Linear, Cosine, Shifted, Entropy"),
        (lambda index: index["sampler"].update(schedule={"_target_": "os.system"}), "sampler.schedule is None"),
        (lambda index: index["sampler"].update(_target_="os.system"), "nothing here knows sampler._target_"),
        (lambda index: index["sampler"]["schedule"].update(_target_="os.system"), "knows sampler.schedule._target_"),
        (lambda index: index["sampler"]["schedule"].update(decide_at=1), "nothing here knows sampler.schedule.decide"),
        (lambda index: index["sampler"]["schedule"].update(steps=10**9), "sampler.schedule.steps cannot be 1000000000"),
        (lambda index: index["sampler"]["schedule"].update(steps=2.5), "sampler.schedule.steps cannot be 2.5"),
        (lambda index: index["sampler"]["schedule"].update(steps=True), "sampler.schedule.steps cannot be True"),
        (lambda index: index["sampler"]["schedule"].update(steps=0), "sampler.schedule.steps must be at least 1"),
        (lambda index: index["sampler"].update(temperature="1\n2"), "sampler.temperature cannot be 1"),
        (lambda index: index["sampler"].update(temperature=float("nan")), "sampler.temperature cannot be nan"),
        (lambda index: index["sampler"].update(temperature=-1), "sampler.temperature must be positive, got -1"),
        (lambda index: index["sampler"].update(guidance=10**400), "sampler.guidance cannot be 1000"),
        (
            lambda index: index["sampler"].update(guidance_interval=[0, 1, 2]),
            "guidance_interval cannot be [0, 1",
        ),
        (lambda index: index["sampler"].update(guidance_interval=[0.5, 0.1]), "sampler.guidance_interval must be [low"),
    ],
)
def test_an_index_that_is_none(folder, change, expected):
    edit(folder, change)
    assert expected in complaint_of(lambda: load_refiner(str(folder)))


def test_a_trusted_package_must_have_such_a_class(folder, monkeypatch):
    monkeypatch.setenv("GRN_TRUST", "json,nowhere")
    for named, expected in {
        ("json", "JSONDecoder"): "json.JSONDecoder must be a class derived from grn.weights.pretrained.Pretrained",
        ("json", "dumps"): "json.dumps must be a class derived from",
        ("nowhere", "Network"): "refiner is nowhere.Network, which cannot be imported: ",
    }.items():
        edit(folder, lambda index, named=named: index.update(refiner=list(named)))
        assert expected in complaint_of(lambda: load_refiner(str(folder)))


def test_a_folder_that_is_not_whole(folder):
    (folder / INDEX).write_bytes(b"[" * 60_000)
    assert "cannot be read as JSON" in complaint_of(lambda: load_refiner(str(folder)))
    (folder / INDEX).write_text("{}")
    assert "is not the config of a GRN network" in complaint_of(lambda: load_refiner(str(folder)))


@pytest.mark.parametrize("lost", FILES[1:])
def test_a_file_that_is_lost(folder, lost):
    (folder / lost).unlink()
    assert complaint_of(lambda: load_refiner(str(folder))).startswith(f"ckpt: {folder}")


def test_another_network_in_a_part(folder):
    shutil.rmtree(folder / "refiner")
    shutil.copytree(folder / "tokenizer", folder / "refiner")
    assert "is of a HBQTokenizer, not of a ClassRefiner" in complaint_of(lambda: load_refiner(str(folder)))


def test_settings_of_before_an_optional_one_came(folder):
    edit(folder, lambda index: index["sampler"].pop("guidance_interval"))
    assert load_exported_refiner(folder).sampler.guidance_interval == (0.0, 1.0)
    edit(folder, lambda index: index["sampler"].update(schedule={"_class_name": "EntropyGuided"}))
    assert load_exported_refiner(folder).sampler.schedule == EntropyGuided()


def test_from_the_hub(folder, tmp_path, monkeypatch):
    def snapshot_download(hub_id, *, allow_patterns, **options):
        """As the Hub's: no more than what is asked for."""
        assert hub_id == "grn-tests/digits"
        for name in files(folder):
            if name in allow_patterns:
                (tmp_path / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / name, tmp_path / "hub" / name)
        return str(tmp_path / "hub")

    monkeypatch.setattr(pretrained, "snapshot_download", snapshot_download)
    assert is_exported_refiner("hf://grn-tests/digits")
    assert set(files(tmp_path / "hub")) == {INDEX}
    module, source = load_refiner("hf://grn-tests/digits")
    assert Path(source["ckpt"]) == tmp_path / "hub"
    assert files(tmp_path / "hub") == files(folder)
    assert weights_hash(module.network.state_dict()) == weights_hash(
        ClassRefiner.from_pretrained("grn-tests/digits", subfolder="refiner").state_dict()
    )
