"""Commands that are killed at random moments and started again: the same bits as of whole ones, and nothing is left.

GRN_KILLS rounds of each command, by moments of GRN_KILLS_SEED.
"""

import hashlib
import json
import os
import random
import shutil
import time

import commands
import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.kill]

ROUNDS = int(os.environ.get("GRN_KILLS", "2"))
SEED = int(os.environ.get("GRN_KILLS_SEED", "0"))
KILLS = 3  # of a round, at most

TRAIN = (
    "grn.train +experiment=digits_tokenizer model.dim=8 model.decoder_dim=8 data.batch_size=20 trainer.max_steps=24 "
    "trainer.val_check_interval=8 callbacks.last.every_n_train_steps=4 training.warmup_steps=2 logger=csv cluster=cpu "
    "trainer.log_every_n_steps=4 ckpt_path=auto name="
)
# What is killed, by what it writes.
COMMANDS = {
    "prepare": "grn.prepare data=digits num_workers=2 data.root=data/prepared_",
    "train": TRAIN,
    "encode": "grn.encode ckpt=runs/trained data=digits batch_size=32 out=data/encoded_",
    "evaluate": "grn.evaluate ckpt=runs/trained out=evaluations/",
}


class Place:
    """A folder in which commands run."""

    def __init__(self, folder):
        self.folder, self.environment = folder, os.environ | {"GRN_RUNS": "runs", "GRN_DATA": "data"}

    def start(self, command):
        return commands.Command(*command.split(), cwd=self.folder, env=self.environment)

    def finish(self, command):
        """The seconds that it took."""
        start = time.monotonic()
        process = self.start(command)
        assert process.wait(600) == 0, process.output()
        return time.monotonic() - start

    def bits(self, verb, name):
        """What a command has written, without times and paths."""
        if verb == "evaluate":
            metrics = json.loads((self.folder / "evaluations" / name / "metrics.json").read_text())["metrics"]
            return {key: value for key, value in metrics.items() if key != "seconds"}
        if verb == "train":
            path = self.folder / "runs" / name / "checkpoints/last.ckpt"
            saved = torch.load(path, weights_only=True)
            kept = {
                key: saved[key] for key in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step")
            }
            return dict(flat(kept | {"data": saved["loops"]["fit_loop"]["state_dict"]["combined_loader"]}))
        files = (self.folder / "data" / f"{verb}d_{name}").iterdir()
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def hidden(self):
        """What killed writers may have left; loggers' and W&B's own files are theirs."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob(".*"))


def flat(node, path=""):
    if isinstance(node, torch.Tensor):
        yield path, hashlib.sha256(node.numpy().tobytes()).hexdigest()
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from flat(value, f"{path}/{key}")
    elif isinstance(node, (list, tuple)):
        for number, value in enumerate(node):
            yield from flat(value, f"{path}/{number}")
    else:
        yield path, repr(node)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("kills"))
    place.finish("grn.prepare data=digits num_workers=0")
    place.finish(f"{TRAIN}trained")
    return place


@pytest.mark.parametrize("verb", COMMANDS)
def test_killed_commands_end_with_the_same_bits_and_leave_nothing(place, verb):
    command = COMMANDS[verb]
    seconds = place.finish(f"{command}whole")
    whole = place.bits(verb, "whole")
    for number in range(ROUNDS):
        draws, name = random.Random(f"{SEED}/{verb}/{number}"), f"killed{number}"
        if verb == "evaluate":  # which is what most of its time is for
            shutil.rmtree(place.folder / "data/cache", ignore_errors=True)
        moments = []
        for _ in range(KILLS):
            process = place.start(command + name)
            moments.append(draws.uniform(0, seconds))
            time.sleep(moments[-1])
            process.kill()  # with all its workers, if it has not ended
            process.wait(60)
        place.finish(command + name)
        assert place.bits(verb, name) == whole, moments
        assert place.hidden() == [], moments
