"""Which commit a folder is at, for records of what was run."""

import subprocess
from pathlib import Path

import grn

SECONDS = 10  # that git may take


def package_commit() -> str | None:
    """Of the checkout that this package is run from; None of an installed one, or where there is no git."""
    checkout = Path(grn.__file__).parents[1]
    return commit_of(checkout) if (checkout / ".git").exists() else None


def commit_of(folder: Path) -> str | None:
    """The commit of the checkout that a folder lies in, `+` where tracked files were changed; None: there is none."""
    try:
        commit = _git(folder, "rev-parse", "HEAD").strip()
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
