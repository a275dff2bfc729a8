import subprocess

from grn.runtime.git import commit_of, package_commit


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_checkout_tells_its_commit_and_whether_it_was_changed(tmp_path):
    assert commit_of(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a.txt").write_text("a")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(tmp_path / "inside") == commit
    (tmp_path / "untracked.txt").write_text("b")
    assert commit_of(tmp_path) == commit
    (tmp_path / "inside" / "a.txt").write_text("b")
    assert commit_of(tmp_path) == commit + "+"
    assert commit_of(tmp_path / "nowhere") is None


def test_of_this_package():
    found = package_commit()
    assert found is None or len(found.rstrip("+")) == 40
