"""Locks of dead builds go, those of living ones stay; each interpreter has its own place for the op."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from synpref_ray.reward import communication_op
from synpref_ray.reward.communication_op import FOLDER_VARIABLE, drop_stale_locks, extensions_environment


@pytest.mark.parametrize("is_open", [False, True])
def test_a_build_lock_goes_unless_a_process_has_it_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_open: bool) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with lock.open("r+") if is_open else contextlib.nullcontext():
        drop_stale_locks()
    assert lock.exists() == is_open


def test_a_builder_that_is_killed_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    hold = f"import os, time; os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL | os.O_RDWR); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        builder.stdout.readline()
        drop_stale_locks()
        assert lock.exists()
        builder.kill()
    drop_stale_locks()
    assert not lock.exists()


def test_where_the_op_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(communication_op.sys, "prefix", str(tmp_path))
    assert extensions_environment() == {FOLDER_VARIABLE: str(tmp_path / "torch_extensions")}
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert extensions_environment() == {}
    monkeypatch.setenv(FOLDER_VARIABLE, "elsewhere")
    assert extensions_environment() == {}
