"""Locks whose file is removed at the end: never two that hold one at a time."""

import contextlib
import threading
from pathlib import Path
from typing import IO, Any

import pytest

from flower_mcepl.errors import RecordError
from flower_mcepl.files import sealed
from flower_mcepl.files.sealed import file_lock

BUSY = "held by {process}"


def lock(path: Path, *, wait: float = 0) -> contextlib.AbstractContextManager[None]:
    return file_lock(path, wait=wait, busy=BUSY, error=RecordError, remove=True)


def test_who_waited_for_a_removed_file_does_not_hold_beside_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holds; B has opened the file and waits; A ends, and removes it. Before B looks,
    C makes a new one: B may not believe that the lock on the old one is its own.
    """
    path, first, third = tmp_path / ".lock", lock(tmp_path / ".lock"), lock(tmp_path / ".lock")
    real, opened = sealed._lock, []

    def slowly(file: IO[bytes]) -> bool:
        opened.append(file)
        if len(opened) == 1:  # B has opened the file: now A ends, and C comes
            first.__exit__(None, None, None)
            assert not path.exists()
            third.__enter__()
        return real(file)

    first.__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(sealed, "_lock", slowly)
        with pytest.raises(RecordError, match="held by"), lock(path):
            pytest.fail("two hold the lock")
    assert len(opened) == 3  # the lock on the removed file was given up; C; and again
    with pytest.raises(RecordError), lock(path):
        pass
    third.__exit__(None, None, None)
    assert not path.exists()


def test_who_waited_for_a_removed_file_gets_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, first = tmp_path / "run" / ".lock", lock(tmp_path / "run" / ".lock")
    real, calls = sealed._lock, []

    def slowly(file: IO[bytes]) -> bool:
        calls.append(file)
        if len(calls) == 1:
            first.__exit__(None, None, None)
            path.parent.rmdir()  # the folder goes with it
        return real(file)

    first.__enter__()
    monkeypatch.setattr(sealed, "_lock", slowly)
    with lock(path):
        assert path.exists()
        with pytest.raises(RecordError, match="held by"), lock(path):
            pass
    assert not path.exists()


def test_many_that_come_and_go_hold_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "_LOOK_AGAIN", 0.0)
    holders: list[int] = []
    most: list[int] = []

    def come_and_go() -> None:
        for _ in range(50):
            with lock(tmp_path / ".lock", wait=60):
                holders.append(1)
                most.append(len(holders))
                holders.pop()

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), max(most)) == (200, 1)


def test_an_error_of_the_block_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock(tmp_path / ".lock"):
        _: Any = 1 // 0
    with lock(tmp_path / ".lock"):
        pass
