"""What answers before torch is imported, what it costs, the `grn` command and shell completion."""

import json
import os
import resource
import subprocess
import sys

import pytest

import grn
from grn.__main__ import COMMANDS
from grn.cli.words import trial_of_a_sweep

CONFIGURED = [name for name in COMMANDS if name != "demo"]
HEAVY = ("torch", "lightning", "wandb", "transformers", "torchvision", "torchmetrics", "webdataset", "numpy")
GIVEN = {  # what cannot be left out
    "train": ["+experiment=digits_c2i"],
    "calibrate": ["ckpt=hf://a/b", "target_steps=20"],
    "compare": ["a", "b"],
    "info": ["a"],
    **{name: ["ckpt=hf://a/b"] for name in ("sample", "evaluate", "encode", "export", "consolidate")},
}
MISTAKES = [
    ["train", "+experiment=digits_c2i", "guidance=3"],
    ["train", "+experiment=digits_c2i", "+no.such=3"],
    ["train", "+experiment=nothing"],
    ["train", "model=nothing"],
    ["train", "seed=1", "seed=2"],
    ["train"],
    ["train", "+experiment=digits_c2i"],
    ["train", "+experiment=digits_tokenizer", "data.root=nothing"],
    ["train", "+experiment=digits_tokenizer", "ckpt_path=last"],
    ["train", "+experiment=digits_tokenizer", "data=tokens", "data.root=nothing"],
    ["sample"],
    ["sample", "ckpt=nothing"],
    ["sample", "ckpt=hf://a/b", "init=nothing.png"],
    ["sample", "ckpt=hf://a/b", "prompts=nothing.txt"],
    ["sample", "ckpt=nothing", "sampler=calibrated"],
    ["evaluate", "ckpt=nothing"],
    ["encode", "ckpt=nothing"],
    ["encode", "ckpt=hf://a/b", "data=imagenet"],
    ["export", "ckpt=nothing", "tokenizer=official_image"],
    ["calibrate", "ckpt=hf://a/b"],
    ["consolidate", "ckpt=nothing"],
    ["prepare", "data=nothing"],
    ["bench", "what=nothing"],
    ["studio", "ckpt=nothing"],
    ["info"],
]
ONE_PROCESS = """
import contextlib, importlib, io, json, os, sys
cases, heavy = json.loads(sys.argv[1])
told = []
for command, *arguments in cases:
    module = importlib.import_module(f"grn.{command}")
    sys.argv = [f"grn/{command}.py", *arguments]
    os.environ["COMP_LINE"] = f"grn-{command} "
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out):
        try:
            module.main()
        except SystemExit as exit:
            code = exit.code or 0
    told.append([code, out.getvalue(), [name for name in heavy if name in sys.modules]])
print(json.dumps(told))
"""


def environment(folder, **more):
    return os.environ | {"GRN_RUNS": str(folder / "runs"), "GRN_DATA": str(folder / "data")} | more


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """told(cases) -> [exit code or line, stdout, heavy modules] of each, all in one process."""
    folder = tmp_path_factory.mktemp("entry")

    def told(cases):
        done = subprocess.run(
            [sys.executable, "-c", ONE_PROCESS, json.dumps([cases, HEAVY])],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=folder,
            env=environment(folder, PYTHONPATH=os.path.dirname(os.path.dirname(grn.__file__))),
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return told


@pytest.mark.parametrize("names", [("train", "sample", "prepare"), pytest.param(CONFIGURED, marks=pytest.mark.full)])
def test_questions_are_answered_without_torch(told, names):
    cases = []
    for name in names:
        given = GIVEN.get(name, [])
        cases += [[name, "--help"], [name, *given, "--cfg", "job", "--resolve"], [name, "-sc", "query=bash"]]
        if name in ("train", "sample"):  # alike for all
            cases += [[name, "--help-all"], [name, *given, "--cfg", "job"], [name, *given, "--info", "config"]]
    for case, (code, said, heavy) in zip(cases, told(cases)):
        assert code == 0, case
        assert said.strip() or "--info" in case, case  # which is logged
        assert not heavy, case


def test_help_explains_keys(told):
    page, whole = (said for _, said, _ in told([["train", "--help"], ["train", "--help-all"]]))
    explained = "seed: 0                 # of initialization, data order, corruption and pictures"
    assert explained in page
    assert "python -m grn.train +experiment=digits_c2i ckpt_path=last" in page
    assert "warmup_steps" not in page  # a key of training=refiner
    assert "lr_schedule: constant       # or cosine" in whole
    assert whole.startswith(page[: page.index("--help-all")])
    of_samples = told([["sample", "--help"]])[0][1]
    assert "\ncluster: none, slurm, " in of_samples
    assert "\ncluster: auto, cpu, ddp, " in page
    assert "experiment:" not in of_samples
    assert "labels: null            # classes that take turns" in of_samples


def test_keys_may_have_dashes_as_of_wandb_agent(told):
    given = ["train", "+experiment=digits_c2i", "--seed=7", "--training.learning_rate=0.002", "--cfg=job"]
    said = told([given])[0][1]
    assert "\nseed: 7\n" in said
    assert "learning_rate: 0.002" in said
    assert "\nname: digits_c2i\n" in said


def test_each_trial_of_a_wandb_sweep_has_a_run_folder(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r2")
    assert trial_of_a_sweep(["+experiment=digits_c2i", "seed=7"]) == ["name=sweeps/s1/r2"]
    assert trial_of_a_sweep(["name=own"]) == []
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert trial_of_a_sweep(["seed=7"]) == []


@pytest.mark.parametrize("cases", [MISTAKES[::3], pytest.param(MISTAKES, marks=pytest.mark.full)])
def test_mistakes_are_told_without_torch(told, cases):
    for case, (line, said, heavy) in zip(cases, told(cases)):
        assert isinstance(line, str), case
        assert line.startswith("error: "), case
        assert "\n" not in line, case
        assert not said, case
        assert not heavy, case


@pytest.mark.full
def test_resolved_configs_refer_to_nothing(told):
    cases = [[name, *GIVEN.get(name, []), "--cfg", "job", "--resolve"] for name in CONFIGURED]
    for case, (_, said, _) in zip(cases, told(cases)):
        assert "${" not in said, case


def cpu_seconds(*arguments, folder):
    """The least of three runs."""
    measured = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, timeout=120, env=environment(folder))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        measured.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(measured)


@pytest.fixture(scope="module")
def hydra_seconds(tmp_path_factory):
    return cpu_seconds("-c", "import hydra", folder=tmp_path_factory.mktemp("hydra"))


@pytest.mark.parametrize(
    ("most", "arguments"),
    [
        (6, ["grn.train", "--help"]),
        (4, ["grn.train", "+experiment=digits_c2i", "--cfg", "job"]),
        (4, ["grn.train", "+experiment=digits_c2i", "guidance=3"]),
        pytest.param(4, ["grn.sample"], marks=pytest.mark.full),
        pytest.param(4, ["grn.sample", "ckpt=nothing"], marks=pytest.mark.full),
    ],
)
def test_what_an_answer_costs(tmp_path, hydra_seconds, most, arguments):
    """As a multiple of what importing Hydra costs, in CPU time, which other processes hardly change."""
    assert cpu_seconds("-m", *arguments, folder=tmp_path) < most * hydra_seconds


def grn_command(folder, *arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "grn", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(folder, **more),
    )


def test_the_commands_are_listed(tmp_path):
    alone = grn_command(tmp_path)
    assert alone.returncode == 0
    assert set(COMMANDS) <= {line.split()[0] for line in alone.stdout.splitlines() if line.startswith("  ")}
    assert grn_command(tmp_path, "--version").stdout == f"grn {grn.__version__}\n"
    wrong = grn_command(tmp_path, "trian")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: no command trian; there is prepare, train,")


def test_a_command_by_either_name(tmp_path):
    arguments = ["+experiment=digits_c2i", "seed=7", "--cfg", "job"]
    plain = subprocess.run(
        [sys.executable, "-m", "grn.train", *arguments], capture_output=True, text=True, env=environment(tmp_path)
    )
    assert plain.returncode == 0
    assert "seed: 7" in plain.stdout
    assert grn_command(tmp_path, "train", *arguments).stdout == plain.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("grn ", {"train", "sample", "prepare"}),
        ("grn sam", {"sample"}),
        ("grn demo ", set()),
        ("grn train ", {"model=", "seed=", "trainer."}),
        ("grn train +exp", {"+experiment="}),
        ("grn train +experiment=digits_c", {"+experiment=digits_c2i"}),
        ("grn train +experiment=digits_c2i sampler=", {"sampler=linear", "sampler=entropy"}),
        ("grn train +experiment=digits_c2i sampler.schedule.m", {"sampler.schedule.min_steps="}),
        ("grn sample ckpt=a num", {"num="}),
    ],
)
def test_what_a_shell_completes(tmp_path, line, expected):
    """Whole words, of which the shell's `compgen` keeps those that begin as the last one of the line does."""
    asked = grn_command(tmp_path, "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert asked.returncode == 0
    assert not asked.stderr
    assert expected <= set(asked.stdout.split())


def test_nothing_is_completed_of_a_wrong_line(tmp_path):
    asked = grn_command(tmp_path, "-sc", "query=bash", COMP_LINE="grn train model=nothing mod", COMP_POINT="27")
    assert (asked.returncode, asked.stderr) == (0, "")


@pytest.mark.parametrize("start", [["-m", "grn"], ["-m", "grn.sample"]])
def test_completion_in_a_shell(tmp_path, start):
    """Bash itself, with what `-sc install=bash` prints, completes a line of the `grn` command."""
    script = subprocess.run(
        [sys.executable, *start, "-sc", "install=bash"], capture_output=True, text=True, timeout=120
    )
    assert script.returncode == 0, script.stderr
    (tmp_path / "grn").write_text(f'#!/bin/sh\nexec {sys.executable} -m grn "$@"\n')
    (tmp_path / "grn").chmod(0o755)
    ask = 'COMP_LINE="grn train +experiment=digits_t2"; COMP_POINT=${#COMP_LINE}; COMP_CWORD=2; hydra_bash_completion'
    done = subprocess.run(
        ["bash", "-c", f'{script.stdout}\n{ask}\necho "${{COMPREPLY[@]}}"; complete -p grn'],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(
            tmp_path,
            PATH=f"{tmp_path}:{os.environ['PATH']}",
            PYTHONPATH=os.path.dirname(os.path.dirname(grn.__file__)),
        ),
    )
    assert done.stdout.split()[:2] == ["+experiment=digits_t2i", "+experiment=digits_t2v"]
    assert "hydra_bash_completion grn" in done.stdout


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
    ],
)
def test_threads_spin_briefly_unless_told_otherwise(given, expected):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    plain = {name: value for name, value in os.environ.items() if name not in names}
    code = f"import grn, json, os; print(json.dumps({{n: os.environ[n] for n in {names} if n in os.environ}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain | given)
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("module", ["grn.sampling.sample", "grn.sampling.pipeline", "grn.web.server"])
def test_sampling_needs_no_lightning(module):
    """Nor what that imports, which takes seconds."""
    code = f"import sys, {module}; print({{'lightning', 'torchmetrics', 'torchvision', 'scipy'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
