"""What a run tells W&B of what it is made of; what an offline run holds is read back in test_end_to_end."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import WandbLogger

from grn.callbacks.lineage import Lineage

MANIFEST = {"format": 1, "name": "my pictures", "parameters": {"size": 32}, "num_labels": 3, "label_names": None}
MANIFEST |= {"splits": {"train": {"samples": 20, "shards": [{"name": "train-0.tar", "bytes": 5}]}}}
TOKENIZER = {"path": "runs/digits_tokenizer", "step": 900, "sha256": "ab" * 32, "model": {}, "state_dict": None}


class Run:
    id = "abc"

    def __init__(self, mode):
        self.settings, self.logged, self.used = SimpleNamespace(mode=mode), [], []

    def log_artifact(self, artifact):
        self.logged.append(artifact)

    def use_artifact(self, artifact):
        if self.settings.mode != "online":
            raise TypeError("Cannot use artifact when in offline mode.")  # as wandb 0.31 does
        self.used.append(artifact)


@pytest.fixture
def told(tmp_path):
    """told(mode, data module): the run that was told of all this."""
    (tmp_path / "config.yaml").write_text("seed: 0\n")

    def tell(mode, datamodule, tokenizer=TOKENIZER):
        run = Run(mode)
        trainer = SimpleNamespace(loggers=[WandbLogger(experiment=run)], datamodule=datamodule)
        module = SimpleNamespace(checkpoint_extras={"tokenizer": tokenizer} if tokenizer else {})
        Lineage(str(tmp_path / "config.yaml")).on_train_start(trainer, module)
        return run

    return tell


def content(artifact):
    (entry,) = artifact.manifest.entries.values()
    return json.loads(Path(entry.local_path).read_text())


def test_data_and_tokenizer_are_what_an_online_run_uses(told):
    data = SimpleNamespace(manifest=MANIFEST)
    run = told("online", data)
    assert [artifact.type for artifact in run.logged] == ["code", "config"]
    pictures, tokenizer = run.used
    assert (pictures.name, pictures.type, tokenizer.type) == ("data-my_pictures", "dataset", "model")
    assert content(pictures)["samples"] == {"train": 20}
    assert content(tokenizer) == {"path": "runs/digits_tokenizer", "step": 900, "sha256": "ab" * 32}
    assert pictures.digest == told("online", data).used[0].digest  # one node of the graph for all runs of it
    grown = MANIFEST | {"splits": {"train": {"samples": 20, "shards": [{"name": "train-0.tar", "bytes": 6}]}}}
    assert pictures.digest != told("online", SimpleNamespace(manifest=grown)).used[0].digest


def test_parts_of_mixed_data_are_told_each(told):
    parts = {name: SimpleNamespace(manifest=MANIFEST | {"name": name}) for name in ("images", "clips")}
    run = told("online", SimpleNamespace(parts=parts), tokenizer=None)
    assert [artifact.name for artifact in run.used] == ["data-images", "data-clips"]


def test_an_offline_run_and_own_data_have_code_and_config(told):
    assert told("offline", SimpleNamespace(manifest=MANIFEST)).used == []
    assert told("online", object(), tokenizer=None).used == []
