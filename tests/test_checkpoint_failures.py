"""Checkpoints: one is always whole, whatever ends a save or a load."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import threading
import time

import checkpoint_cases
import pytest
import torch
from checkpoint_cases import Training, assert_same, small, small_chunks, snapshot, stepped
from fresh_processes import run_fresh

import fastmargin as fm
from fastmargin.checkpoint import folder

# fixtures
chunks = checkpoint_cases.chunks

pytestmark = pytest.mark.dist


# ---- interrupted ----


@pytest.mark.parametrize(
    "where", ["storage.write", "storage.plan", "folder.make_current", "os.replace"]
)
def test_a_save_that_fails_leaves_the_checkpoint_before(where, tmp_path, monkeypatch):
    from fastmargin.checkpoint import storage

    saved = stepped(small())
    fm.checkpoint.save(tmp_path, saved)
    before = snapshot(saved)
    stepped(saved, 1)

    def fail(*_):
        raise OSError("no space left")

    module, name = where.split(".")
    with monkeypatch.context() as patch:
        patch.setattr({"storage": storage, "folder": folder, "os": os}[module], name, fail)
        with pytest.raises(OSError, match="no space left"):
            fm.checkpoint.save(tmp_path, saved)
    loaded = small()
    fm.checkpoint.load(tmp_path, loaded)
    assert_same(snapshot(loaded), before)
    # the next one clears up
    fm.checkpoint.save(tmp_path, saved)
    fm.checkpoint.load(tmp_path, loaded)
    assert_same(snapshot(loaded), snapshot(saved))
    assert len(list(tmp_path.glob("version-*"))) == 1


def test_a_damaged_file_changes_nothing(tmp_path):
    saved = stepped(small())
    fm.checkpoint.save(tmp_path, saved)
    (file,) = tmp_path.glob("*/*.distcp")
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size - 100)
    objects = stepped(small(), 1)
    before = snapshot(objects)
    with pytest.raises((RuntimeError, EOFError)):
        fm.checkpoint.load(tmp_path, objects)
    assert_same(snapshot(objects), before)


def test_training_goes_on_while_it_writes(tmp_path, monkeypatch):
    from fastmargin.checkpoint import storage

    go, write = threading.Event(), storage.write
    monkeypatch.setattr(storage, "write", lambda *a: (go.wait(30), write(*a))[1])
    saved = {**stepped(small()), "value": [1]}
    before = snapshot(saved)
    saving = fm.checkpoint.async_save(tmp_path, saved)
    stepped(saved, 1)["value"].append(2)
    assert not saving.done()
    go.set()
    loaded = small()
    assert fm.checkpoint.load(tmp_path, loaded) == {"value": [1]}  # it waits
    assert saving.done()
    assert_same(snapshot(loaded), before)


def test_an_error_nobody_asked_for_is_told_once(tmp_path, monkeypatch):
    from fastmargin.checkpoint import storage

    saved, unwritten = stepped(small()), storage.write
    monkeypatch.setattr(storage, "write", lambda *_: 1 / 0)
    fm.checkpoint.async_save(tmp_path, saved)
    with pytest.raises(ZeroDivisionError):
        fm.checkpoint.save(tmp_path, saved)
    monkeypatch.setattr(storage, "write", unwritten)
    fm.checkpoint.save(tmp_path, saved)
    fm.checkpoint.load(tmp_path, saved)


# ---- a process dies ----


def dies(group, path, how):
    """Saves, trains on, and process 1 or 0 dies on the way, or does not come."""
    from fastmargin.checkpoint import storage

    small_chunks()
    rank, write = group.rank(), storage.write
    training = Training(group).trained(2)
    torch.save((training.state(), training.rows()), path / f"state-{rank}")
    path = path / "checkpoint"
    fm.checkpoint.save(path, training.objects)

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def write_half(writer, plan, pieces):
        if rank == 1:
            half = [*plan.items][: len(plan.items) // 2]
            write(writer, dataclasses.replace(plan, items=half), pieces)
            die()
        return write(writer, plan, pieces)

    if how == "step":
        loss = training.loss(2)
        if rank == 1:
            os._exit(7)
        loss.backward()
    elif how == "load":
        training.step(2)
        before = training.state()
        if rank == 1:
            storage.read = die
        try:
            fm.checkpoint.load(path, training.objects)
        finally:
            assert_same(training.state(), before)
    elif how == "absent":
        if rank == 1:
            time.sleep(9)
            return
        fm.checkpoint.save(path, training.objects)
    else:
        training.step(2)
        if how == "end" and rank == 0:
            os.replace = die
        elif how != "end":
            storage.write = write_half
        if how == "async":
            saving = fm.checkpoint.async_save(path, training.objects)
            time.sleep(0.2)
            saving.result()
        else:
            fm.checkpoint.save(path, training.objects)


@pytest.mark.parametrize(
    "how, dead, code, named",
    [
        ("step", 1, 7, "gradients|sum|gathering"),
        ("write", 1, -signal.SIGKILL, r"saving the checkpoint .*\(its files\)"),
        ("async", 1, -signal.SIGKILL, r"saving the checkpoint .*\(its files\)"),
        ("end", 0, -signal.SIGKILL, r"saving the checkpoint .*\(its end\)"),
        ("load", 1, -signal.SIGKILL, r"loading the checkpoint .*\(reading it\)"),
        ("absent", 1, None, "preparing the checkpoint"),
    ],
)
def test_a_process_that_dies_is_an_error_and_no_loss(how, dead, code, named, tmp_path):
    outcomes = run_fresh(3, dies, tmp_path, how, seconds=6 if how == "absent" else 20)
    for rank, outcome in enumerate(outcomes):
        if rank == dead:
            assert outcome.code == code
        else:
            assert re.match(
                f"ProcessError: .*({named}).* between 3 processes failed", outcome.error
            )
    loaded = Training()
    fm.checkpoint.load(tmp_path / "checkpoint", loaded.objects)
    for rank in range(3):
        state, rows = torch.load(tmp_path / f"state-{rank}")
        assert_same(state, loaded.state(), rows)
