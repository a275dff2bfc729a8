"""The README, docs/ and what the code cites of them: links, anchors, commands, examples, the site, the tour."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import commands
import nbformat
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from nbclient import NotebookClient
from PIL import Image

import grn.cli.entry  # noqa: F401  the resolvers of configs
from grn.__main__ import COMMANDS
from grn.cli.words import as_overrides
from grn.networks.tokenizer import HBQTokenizer
from grn.runtime.config_folder import CONF
from grn.runtime.overrides import literal
from grn.training.building import module_from_config
from grn.weights import pretrained

ROOT = Path(__file__).parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "experiments").glob("*/*.md"),
]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
SOURCES = ("grn", "hydra_plugins", "conf", "tests", "experiments", "docs", ".ci")
OTHERS = {"docker", "img2dataset", "wandb", "eval", "export", "pre-commit"}  # programs that are not of this repository
FIRST_PAGES = ("README.md", "docs/getting_started.md")
OWN_PACKAGE = ("hydra.searchpath=", "+experiment=stripes")  # of docs/template, which has a test of its own
OTHER_KEYS = {"reservation", "max_batch_size", "storage", "searchpath"}  # of sbatch and Hydra; files
FLAGS = {"-m", "--help", "--help-all", "--resolve", "--version", "--cfg", "job"}

LINK = re.compile(r"\]\(([^)\s]+)\)")
CITED = re.compile(r"docs/\w+\.md(?:#[\w-]+)?")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(rf"`(?:python -m grn\.|grn )?((?:{'|'.join(COMMANDS)}) [^`…]*)`")


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, *languages):
    return [block for language, block in BLOCK.findall(text(name)) if language in languages]


def anchors(path):
    """The headings of a page, as GitHub and MkDocs name them."""
    headings = re.findall(r"^#+ +(.+?) *$", BLOCK.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def source_files():
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".md", ".html", ".ipynb") and path != Path(__file__):
                yield path
    yield from (ROOT / name for name in ("README.md", "Makefile", "pyproject.toml", "mkdocs.yml"))


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for target in LINK.findall(BLOCK.sub("", text(name))):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / file) if file else ROOT / name
        assert path.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(path), f"{name}: {target}"


def test_what_the_code_cites_is_there():
    for path in source_files():
        for cited in CITED.findall(path.read_text(encoding="utf-8")):
            page, _, anchor = cited.partition("#")
            assert (ROOT / page).is_file(), f"{path}: {cited}"
            assert not anchor or anchor in anchors(ROOT / page), f"{path}: {cited}"


def test_nothing_cites_what_is_not_here():
    for path in source_files():
        content = path.read_text(encoding="utf-8")
        assert "DESIGN" not in content, path
        assert "../shared" not in content, path


@pytest.mark.parametrize("name", [name for name in NAMES if name != "docs/faq.md"])  # which names the authors' files
def test_files_that_pages_name_are_there(name):
    for path in re.findall(r"`((?:grn|conf|tests|docs|experiments|hydra_plugins)/[\w./-]*)`", text(name)):
        assert (ROOT / path).exists(), f"{name}: {path}"


def test_the_readme_keeps_its_promises():
    """Six kilobytes, and exactly two commands that set everything up."""
    assert len(text("README.md").encode()) <= 6000
    (setup,) = (block for block in blocks("README.md", "sh") if "make" in block)
    assert [line.split("#")[0].strip() for line in setup.splitlines()] == ["make demo", "make test"]


# Commands.


def simple_commands(block):
    """The words of each command of a shell block, without variables before it."""
    for line in block.replace("\\\n", " ").splitlines():
        words, command = shlex.split(line, comments=True), []
        for word in [*words, "&&"]:
            if word != "&&":
                command.append(word)
                continue
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command.pop(0)
            if command:
                yield command
            command = []


def of_grn(command):
    """(Verb, arguments) of `python -m grn.verb ...`, also after torchrun or srun, and of `grn verb ...`; else None."""
    if command[0] == "grn":
        return (command[1], command[2:]) if command[1] in COMMANDS else None
    for number, word in enumerate(command):
        if word == "-m" and command[number + 1].startswith("grn.") and number < 12:
            return command[number + 1].removeprefix("grn."), command[number + 2 :]
    return None


def documented():
    """(Page, command) of every shell block and of every command within the text."""
    for name in NAMES:
        for block in blocks(name, "sh"):
            if not block.startswith("for "):  # loops: only their syntax is looked at
                yield from ((name, command) for command in simple_commands(block))
        for words in INLINE.findall(BLOCK.sub("", text(name))):
            yield name, ["grn", *shlex.split(words)]


VERBS = sorted({(name, *of_grn(command)[:1], *of_grn(command)[1]) for name, command in documented() if of_grn(command)})


@pytest.mark.parametrize("name", NAMES)
def test_shell_blocks_are_shell(name):
    for block in blocks(name, "sh"):
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0, block


def first_points(arguments):
    """Overrides of a sweep's first point."""
    for override in OverridesParser.create().parse_overrides(arguments):
        if override.is_sweep_override():
            key = override.get_key_element()
            yield f"{key}={next(iter(override.sweep_string_iterator()))}"
        else:
            yield override.input_line


def first_of_each():
    """Every command once, under the first page that has it; in `make test` those that a reader tries first."""
    seen = set()
    for page in sorted({page for page, *_ in VERBS}, key=lambda page: (page not in FIRST_PAGES, page)):
        commands = {tuple(command) for name, *command in VERBS if name == page} - seen
        seen |= commands
        if commands:
            mark = () if page in FIRST_PAGES else pytest.mark.full
            yield pytest.param(sorted(commands), id=page, marks=mark)


WORDS = {"compare": "results", "ls": "folder", "info": "ckpt"}  # the key of arguments that stand alone


@pytest.mark.parametrize("commands", first_of_each())
def test_commands_compose(commands):
    """Groups, options and keys of every command are there."""
    for verb, *arguments in commands:
        given = [word for word in arguments if word not in FLAGS and not word.startswith(OWN_PACKAGE)]
        if verb in WORDS:
            given = as_overrides(given, WORDS[verb], several=verb == "compare")
        given = literal(given, sweep="-m" in arguments)
        if given:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                compose(verb, list(first_points(given)))


def test_keys_that_pages_name_are_in_conf():
    """`training.gan_weight=0` and the like: some file of conf/ has a key of that name."""
    groups = "|".join(path.name for path in CONF.iterdir() if path.is_dir())
    named = re.compile(rf"`(?:{groups}|trainer)((?:\.\w+)+)(?:=[^`]*)?`")
    conf = "\n".join(path.read_text(encoding="utf-8") for path in CONF.rglob("*.yaml"))
    keys = set(re.findall(r"(?:^|[{,]) *(?:# *)?(\w+):", conf, re.MULTILINE))
    for name in NAMES:
        for key in named.findall(BLOCK.sub("", text(name))):
            assert key.rpartition(".")[2] in keys | OTHER_KEYS, f"{name}: {key}"


def test_other_commands_are_there():
    targets = set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))
    extras = text("pyproject.toml").partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))
    for name, command in documented():
        if of_grn(command):
            continue
        program, *arguments = command
        if program == "make":
            assert arguments[0] in targets, (name, command)
        elif program == "pip":
            asked = re.findall(r"\[([\w,]+)\]", " ".join(arguments))
            assert all(set(found.split(",")) <= extras for found in asked), (name, command)
        elif program in ("python", "pytest"):
            path = next(word for word in arguments if not word.startswith("-"))
            assert (ROOT / path).exists() or path in ("build",), (name, command)
        elif program == "grn":
            assert arguments[0] in FLAGS, (name, command)
        elif program == "for":
            continue
        else:
            assert program in OTHERS, (name, command)


# Examples in Python.

TOKENIZER = {
    "latent_channels": 4,
    "rounds": 4,
    "dim": 8,
    "decoder_dim": 8,
    "multipliers": (1, 2),
    "blocks_per_stage": 1,
}
SHORT = " sampler.schedule.warmup=1 sampler.schedule.min_steps=4 sampler.schedule.max_steps=6"
CLASSES = "+experiment=digits_c2i model.depth=2 model.width=32 model.heads=2 model.bottleneck=8 model.context_start=1"
TEXTS = "+experiment=digits_t2i model.depth=2 model.width=24 model.heads=2 model.mlp_ratio=11 model.text_width=16"
TEXTS += " text_encoder.width=16 text_encoder.depth=1 text_encoder.heads=2 text_encoder.hidden=16"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Run folders and files that the examples read: networks of random weights, two steps of refinement and more."""
    folder = tmp_path_factory.mktemp("workspace")
    torch.manual_seed(0)
    tokenizer = HBQTokenizer(**TOKENIZER, temporal=(False,)).save_pretrained(folder / "hbq16")
    for name, overrides in (("digits_c2i", CLASSES), ("digits_t2i", TEXTS)):
        run = folder / "runs" / name
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", [*(overrides + SHORT).split(), f"tokenizer.ckpt={tokenizer}"])
        module = module_from_config(config)
        contents = {"state_dict": module.state_dict(), "global_step": 1}
        module.on_save_checkpoint(contents)
        (run / "checkpoints").mkdir(parents=True)
        torch.save(contents, run / "checkpoints" / "last.ckpt")
    (folder / "experiments").symlink_to(ROOT / "experiments")  # where the trained critters are
    for name in ("image.png", "mask.png"):
        Image.new("RGB", (32, 32), "white").save(folder / name)
    return folder


@pytest.mark.parametrize("name", ["README.md", "docs/python.md", "docs/extending.md"])
def test_examples_run(name, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(pretrained, "HfApi", Mock())  # nothing goes to the Hub
    scope = {}
    for block in blocks(name, "python"):
        exec(compile(block, name, "exec"), scope)


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_python(name):
    for block in blocks(name, "python"):
        compile(block, name, "exec")


def test_a_package_of_ones_own(workspace, tmp_path):
    """docs/template, installed: its network trains on its plain data module, is sampled, scored and exported."""
    shutil.copytree(ROOT / "docs" / "template", tmp_path / "template")  # pip builds where the sources are
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", tmp_path / "site", tmp_path / "template"], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    assert not {"grn", "hydra_plugins"} & {path.name for path in (tmp_path / "site").iterdir()}

    def run(verb, *arguments, trust=True):
        own = {"GRN_TRUST": "stripes"} if trust else {}
        return commands.run(f"grn.{verb}", *arguments, cwd=tmp_path, env=environment | own)

    def succeed(verb, *arguments, **keywords):
        done = run(verb, *arguments, **keywords)
        assert done.returncode == 0, done.stderr

    asked = ["hydra.searchpath=[pkg://stripes.conf]", "+experiment=stripes", f"tokenizer.ckpt={workspace}/hbq16"]
    asked += ["model.width=16", "trainer.max_steps=2", "trainer.val_check_interval=2", "callbacks.scores.num=8"]
    succeed("train", *asked, "callbacks.grid.num=4", "sampler.schedule.steps=3", "logger=csv", trust=False)
    run_folder = tmp_path / "runs" / "stripes"
    assert "eval/stripes_read" in json.loads((run_folder / "metrics.json").read_text())["metrics"]
    assert "GRN_TRUST=stripes" in run("sample", "ckpt=runs/stripes", "num=2", trust=False).stderr
    succeed("evaluate", "ckpt=runs/stripes", "num=8")
    assert "stripes_read" in json.loads((run_folder / "evaluation" / "metrics.json").read_text())["metrics"]
    succeed("export", "ckpt=runs/stripes")
    index = json.loads((run_folder / "export" / "model_index.json").read_text())
    assert index["refiner"] == ["stripes.networks", "ConvRefiner"]
    assert index["sampler"]["schedule"] == {"_class_name": "stripes.schedules.Quadratic", "steps": 3, "power": 2.0}
    assert "GRN_TRUST=stripes" in run("sample", "ckpt=runs/stripes/export", "num=2", trust=False).stderr
    succeed("sample", "ckpt=runs/stripes/export", "num=2", "out=drawn")
    assert (tmp_path / "drawn" / "samples.png").is_file()


@pytest.mark.full
def test_the_tour_runs():
    """docs/tour.ipynb from its first cell to its last, on the pair in experiments/critters/model."""
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()


def test_the_tour_was_saved_with_its_pictures():
    cells = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 7
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


@pytest.mark.full
def test_the_site_builds(tmp_path):
    """Strictly, and nothing in it is fetched from elsewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "<math" in (tmp_path / "site" / "method.html").read_text(encoding="utf-8")
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text(encoding="utf-8")
        )
        assert not fetched, (page, fetched)


def test_curves_read_what_runs_write(tmp_path):
    script = runpy.run_path(str(ROOT / "experiments" / "curves.py"))
    (tmp_path / "metrics.csv").write_text(
        "step,train/images_per_second,train/loss,val/loss\n4,32,2.5,\n9,64,2.25,\n9,,,2.0\n14,128,2.0,\n"
    )
    found = script["curves"](tmp_path / "metrics.csv")
    assert found == {"loss": [(4, 2.5), (9, 2.25), (14, 2.0)], "seconds": [1.0, 0.5]}
    script["draw"]({"a": found, "b": found}, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 500
    for verb, *arguments in script["stages"](20):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose(verb, arguments)


@pytest.mark.full
def test_curves_of_two_commits(tmp_path):
    """This commit against itself: the same losses, and no worktree is left."""
    command = [sys.executable, "experiments/curves.py", "HEAD", "--steps", "10", "--out", str(tmp_path)]
    before = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    subprocess.run(command, cwd=ROOT, check=True)
    after = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert before == after
    base, here = json.loads((tmp_path / "curves.json").read_text()).values()
    assert base["loss"] == here["loss"]
    assert len(base["loss"]) == 2
    assert (tmp_path / "curves.png").is_file()
