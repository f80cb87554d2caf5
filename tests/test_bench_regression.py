"""The guard sees a version that is slower, and leaves nothing behind."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import ROOT, provenance, regression
from benchmarks.cases import Case
from benchmarks.regression import Outcome, Version, VersionError
from benchmarks.spread import Spread

SMALL = Case("small", 4, 20, 8)


def test_judgement():
    def outcome(median, low, high):
        return Outcome(SMALL, Spread(median, low, high), 1.0)

    assert regression.judge([outcome(1.09, 1.0, 1.2), outcome(0.5, 0.4, 0.6)], 1.1) == 0
    assert regression.judge([outcome(1.0, 0.9, 1.1), outcome(1.11, 1.01, 1.2)], 1.1) == 1
    assert regression.judge([outcome(1.3, 0.9, 2.0)], 1.1) == 0  # a busy machine, not slower
    assert regression.judge([outcome(1.04, 1.02, 1.06)], 1.03) == 1
    failed = Outcome(SMALL, error="no such margin")
    assert regression.judge([failed, outcome(1.0, 0.9, 1.1)], 1.1) == 0
    assert regression.judge([failed], 1.1) == 2


def test_slower_counts_when_it_is_so_twice(monkeypatch):
    def confirmed(*ratios):
        outcomes = [Outcome(SMALL, Spread(ratio, ratio, ratio), 1.0) for ratio in ratios]
        monkeypatch.setattr(regression, "compare", lambda *a: outcomes.pop(0))
        return regression.confirmed(None, None, SMALL, 5, 1.1).ratio.median, len(outcomes)

    assert confirmed(1.0, 9.0) == (1.0, 1)
    assert confirmed(2.0, 1.0) == (1.0, 0)
    assert confirmed(2.0, 3.0) == (3.0, 0)


@pytest.fixture
def copy(tmp_path):
    """A tree whose head sleeps in every forward."""
    tree = tmp_path / "slow"
    shutil.copytree(ROOT / "fastmargin", tree / "fastmargin")
    head = tree / "fastmargin" / "head.py"
    text = head.read_text()
    sleepy = '        checks.check_choice("reduction", reduction, functional.REDUCTIONS)\n'
    assert sleepy in text
    head.write_text(text.replace(sleepy, f"        import time; time.sleep(0.2)\n{sleepy}"))
    return tree


def test_a_slower_version_is_seen(copy):
    versions = Version(copy, 1), Version(ROOT, 1)
    try:
        slow = regression.compare(*versions, SMALL, turns=4)
        assert slow.ratio.median > 2 and slow.seconds >= 0.2 and slow.slower(1.1)
        fast = regression.compare(*reversed(versions), SMALL, turns=4)
        assert fast.ratio.median < 0.5 and not fast.slower(1.1)
        pfc = Case("pfc", 4, 20, 8, "cosface", rate=0.5, state="sgd")
        assert regression.compare(*versions, pfc, turns=2).error is None
    finally:
        for version in versions:
            version.close()


def test_a_case_that_a_version_cannot_do_is_told():
    version = Version(ROOT, 1)
    try:
        with pytest.raises(VersionError, match="step"):
            version.ask(steps=1)
        version.ask = lambda **line: (_ for _ in ()).throw(VersionError("no AdaFace"))
        assert regression.compare(version, version, SMALL, 1).error == "no AdaFace"
    finally:
        version.close()


def test_a_tree_without_the_package_is_an_error(tmp_path):
    with pytest.raises(VersionError, match=r"not from|ended"):
        Version(tmp_path, 1)


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A repository with the sources of a package and something compiled."""
    root = tmp_path / "repository"
    (root / "fastmargin").mkdir(parents=True)
    (root / "csrc").mkdir()
    (root / "csrc" / "a.cpp").write_text("one\n")
    (root / ".gitignore").write_text("*.so\n")
    (root / "setup.py").write_text("open('fastmargin/built.so', 'w').write('built')\n")
    (root / "fastmargin" / "__init__.py").write_text("")

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    (root / "fastmargin" / "here.so").write_text("compiled here")
    monkeypatch.setattr(regression, "ROOT", root)
    monkeypatch.setattr(provenance, "ROOT", root)
    return root


def worktrees(root: Path) -> int:
    listed = subprocess.run(
        ["git", "worktree", "list"], cwd=root, capture_output=True, text=True, check=True
    )
    return len(listed.stdout.splitlines())


def test_the_other_version_is_built_only_if_its_sources_differ(repository):
    with regression.checked_out("HEAD") as tree:
        assert {file.name for file in (tree / "fastmargin").glob("*.so")} == {"here.so"}
        assert worktrees(repository) == 2
    assert worktrees(repository) == 1 and not tree.exists()
    (repository / "csrc" / "new.cpp").write_text("two\n")
    with regression.checked_out("HEAD") as tree:
        assert {file.name for file in (tree / "fastmargin").glob("*.so")} == {"built.so"}
    (repository / "csrc" / "new.cpp").unlink()
    (repository / "csrc" / "a.cpp").write_text("two\n")
    with regression.checked_out("main") as tree:
        assert {file.name for file in (tree / "fastmargin").glob("*.so")} == {"built.so"}


def test_errors_leave_no_worktree(repository, capsys):
    with pytest.raises(KeyError), regression.checked_out("HEAD"):
        raise KeyError
    with (
        pytest.raises(VersionError, match="no commit 'nothing'"),
        regression.checked_out("nothing"),
    ):
        pass
    assert regression.main(["--ref", "nothing"]) == 2
    assert "no commit" in capsys.readouterr().err
    (repository / "setup.py").write_text("raise SystemExit('cannot compile')\n")
    (repository / "csrc" / "a.cpp").write_text("two\n")
    subprocess.run(
        ["git", "commit", "-qam", "x", "--author", "a <a@b>"],
        cwd=repository,
        env={"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b", "PATH": "/usr/bin:/bin"},
        check=True,
    )
    (repository / "csrc" / "a.cpp").write_text("three\n")
    with pytest.raises(VersionError, match="cannot compile"), regression.checked_out("HEAD"):
        pass
    assert worktrees(repository) == 1
    assert regression.default_ref() == provenance.git("rev-parse", "HEAD")
