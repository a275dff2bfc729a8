"""The Dockerfile, as far as it can be read without Docker: every word known, every file there, nobody is root."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
KNOWN = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}


def instructions():
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]


def test_every_instruction_is_one_of_docker_s():
    found = instructions()
    assert found[0][0] == "FROM"
    assert {word for word, _ in found} <= KNOWN
    for word, rest in found:
        if word in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(rest), list)
        if word == "RUN":
            assert rest.count('"') % 2 == 0
            assert "--no-cache-dir" in rest or "pip install" not in rest


def test_what_is_copied_is_there_and_not_ignored():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_it_installs_what_the_package_needs_and_runs_as_somebody():
    text = (ROOT / "Dockerfile").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{name}' in text and f'"{name}' in project for name in ("torch>=2.11", "torchvision>=0.26"))
    extras = re.search(r"EXTRAS=(\S+)", text)[1].split(",")
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
    users = [rest for word, rest in instructions() if word == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
