"""The card of an export: what the Hub reads of it, scores of the same step alone, and exporting again."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from test_pipeline import CLASSES, write_run

from grn.evaluation.model_card import write_card
from grn.sampling.pipeline import GRNPipeline
from grn.weights import pretrained

CRITTERS = Path(__file__).parents[2] / "experiments" / "critters" / "model"


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    content = {
        "step": 2400,
        "num": 100,
        "seed": 1,
        "sampler": "Sampler(Linear(20))",
        "settings": {"data": {"name": "x"}},
    }
    content["metrics"] = {"fid": 12.5, "fid_samples": 100, "seconds": 3.0, "worse": float("nan")}
    (folder / "metrics.json").write_text(json.dumps(content))
    Image.new("RGB", (8, 8)).save(folder / "samples.png")
    return folder


@pytest.fixture
def export(tmp_path):
    return shutil.copytree(CRITTERS, tmp_path / "critters")


def test_the_hub_reads_scores_and_licence(export, results):
    card = ModelCard.load(write_card(export, results=results, license="mit"))
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == ("mit", "grn", "text-to-image")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("fid", 12.5, "x")
    assert "refiner 1.48 M" in card.text
    assert "12.5000 of 100 samples" in card.text
    assert "sampler: `Sampler(Linear(20))`" in card.text
    assert "![samples](samples.png)" in card.text
    assert (export / "samples.png").read_bytes() == (results / "samples.png").read_bytes()
    snippet = card.text.partition("```python\n")[2].partition("```")[0]
    compile(snippet, "card", "exec")
    assert f'GRNPipeline.from_pretrained("{export}")' in snippet


@pytest.mark.parametrize("content", ['{"step": 1, "metrics": {"fid": 1}}', "[", '{"step": 2400, "metrics": 3}', None])
def test_results_of_other_steps_are_not_told(export, results, content):
    (results / "metrics.json").unlink()
    if content is not None:
        (results / "metrics.json").write_text(content)
    card = ModelCard.load(write_card(export, results=results))
    assert card.data.eval_results is None
    assert "## Scores" not in card.text
    assert "Not stated." in card.text
    assert not (export / "samples.png").exists()


def test_tokenizers_have_one_too(export, results):
    card = ModelCard.load(write_card(export / "tokenizer", results=results))
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "HBQTokenizer.from_pretrained" in card.text


def test_an_export_with_a_card_is_replaced_and_uploaded(tmp_path, results, monkeypatch):
    pipe = GRNPipeline.from_pretrained(write_run(tmp_path / "run", CLASSES))
    folder = pipe.save_pretrained(tmp_path / "export")
    write_card(folder, results=results)
    assert pipe.save_pretrained(folder) == folder
    assert not (folder / "README.md").exists()  # it was of the weights before
    sent = {}

    class Hub:
        def __init__(self, token):
            pass

        def create_repo(self, *_, **__):
            pass

        def upload_folder(self, *, repo_id, folder_path, revision):
            sent[repo_id] = GRNPipeline.from_pretrained(folder_path)
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}"})

    monkeypatch.setattr(pretrained, "HfApi", Hub)
    assert pipe.push_to_hub("grn-tests/refiner") == "https://hub/grn-tests/refiner"
    assert repr(sent["grn-tests/refiner"]) == repr(pipe)
