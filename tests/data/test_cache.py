"""Decoded data on disk: made once, read by every later process, never half."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flower_mcepl import ConfigError, DataError
from flower_mcepl.data.cache import TENSORS, cached_tensors
from flower_mcepl.files.sealed import write_sealed
from tests.fleet.agents import same_tensors
from tests.fleet.twins import twin

SETTINGS = {"data": "digits", "classes": [1, 2], "seed": 3, "version": 1}


class Decoder:
    """Makes the same tensors each time, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, Tensor]:
        self.calls += 1
        images = torch.arange(24.0).reshape(2, 3, 4).transpose(1, 2)  # not contiguous
        return {
            "images": images,
            "labels": torch.tensor([4, 2]),
            "none": torch.zeros(0, 3),
            "flag": torch.tensor(True),
        }


def test_what_was_made_is_read(tmp_path: Path) -> None:
    decode = Decoder()
    made, read = (cached_tensors(tmp_path / "deep", SETTINGS, decode) for _ in range(2))
    assert decode.calls == 1
    assert same_tensors(made, read)
    assert same_tensors(read, decode())
    assert [*made] == [*read] == ["flag", "images", "labels", "none"]
    assert {name: tensor.dtype for name, tensor in read.items()} == {
        "images": torch.float32, "labels": torch.int64, "none": torch.float32, "flag": torch.bool,
    }  # fmt: skip
    read["images"].add_(1)  # one's own copy
    assert same_tensors(cached_tensors(tmp_path / "deep", SETTINGS, decode), made)


def test_other_settings_are_other_tensors(tmp_path: Path) -> None:
    decode = Decoder()
    for settings in (
        SETTINGS,
        {**SETTINGS, "version": 2},
        {**SETTINGS, "seed": 4},
        {},
        dict(reversed(SETTINGS.items())),
    ):
        cached_tensors(tmp_path, settings, decode)
    assert decode.calls == 4  # their order does not matter
    assert len(list(tmp_path.glob("*.tensors"))) == 4


@pytest.mark.parametrize("cut", [0, 5, 30, 100, -1])
def test_a_damaged_file_is_made_anew(
    tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    decode = Decoder()
    cached_tensors(tmp_path, SETTINGS, decode)
    (file,) = tmp_path.glob("*.tensors")
    file.write_bytes(file.read_bytes()[:cut])
    assert same_tensors(cached_tensors(tmp_path, SETTINGS, decode), Decoder()())
    assert decode.calls == 2
    assert "are damaged" in caplog.text
    assert '"data": "digits"' in caplog.text
    cached_tensors(tmp_path, SETTINGS, decode)
    assert decode.calls == 2


def test_leftovers_of_a_killed_writer_go_with_the_next(tmp_path: Path) -> None:
    cached_tensors(tmp_path, SETTINGS, Decoder())
    (file,) = tmp_path.glob("*.tensors")
    leftover = tmp_path / f".{file.name}.123.tmp"
    leftover.write_bytes(file.read_bytes()[:50])
    file.unlink()
    cached_tensors(tmp_path, SETTINGS, Decoder())
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_a_decoder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, Tensor]:
        raise OSError("no images here")

    with pytest.raises(OSError, match="no images here"):
        cached_tensors(tmp_path, SETTINGS, fail)
    assert list(tmp_path.glob("*.tensors")) == []
    assert same_tensors(cached_tensors(tmp_path, SETTINGS, Decoder()), Decoder()())


@pytest.mark.parametrize(
    "settings", [{"x": {1}}, {"x": float("nan")}, {(1, 2): 3}, {"x": Path("data")}]
)
def test_settings_must_be_plain(tmp_path: Path, settings: Any) -> None:
    with pytest.raises(
        ConfigError,
        match="the settings of cached tensors must be numbers, text, lists and dicts; got",
    ):
        cached_tensors(tmp_path, settings, Decoder())


@pytest.mark.parametrize("made", [None, [torch.zeros(1)], {"x": [1.0]}, {1: torch.zeros(1)}])
def test_only_tensors_by_name_are_kept(tmp_path: Path, made: Any) -> None:
    with pytest.raises(DataError, match="must come as a dict of name to tensor; got"):
        cached_tensors(tmp_path, SETTINGS, lambda: made)
    assert list(tmp_path.glob("*.tensors")) == []


def test_tensors_may_share_memory(tmp_path: Path) -> None:
    pixels = torch.arange(6.0)
    made = {"all": pixels, "again": pixels, "half": pixels[:3]}
    for _ in range(2):
        assert same_tensors(cached_tensors(tmp_path, SETTINGS, lambda: made), made)


@pytest.mark.parametrize("place", ["folder", "file"])
def test_where_nothing_can_be_written_what_was_made_is_returned(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if place == "folder":
        folder = tmp_path / "no-folder" / "cache"
        folder.parent.write_text("a file")
    else:
        folder = tmp_path

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
    decode = Decoder()
    for calls in (1, 2):
        assert same_tensors(cached_tensors(folder, SETTINGS, decode), Decoder()())
        assert decode.calls == calls
    assert f"tensors are not kept in {folder}" in caplog.text
    assert list(tmp_path.rglob("*.tensors")) == list(tmp_path.rglob("*.tmp")) == []


def test_nobody_waits_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("flower_mcepl.data.cache.PATIENCE", 0.1)
    decode = Decoder()

    def hang() -> dict[str, Tensor]:
        # another one's lock, as far as flock goes
        return cached_tensors(tmp_path, SETTINGS, decode)

    assert same_tensors(cached_tensors(tmp_path, SETTINGS, hang), Decoder()())
    assert "has been making them for too long" in caplog.text
    assert decode.calls == 1


def test_a_file_of_another_version_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cached_tensors(tmp_path, SETTINGS, Decoder())
    (file,) = tmp_path.glob("*.tensors")
    write_sealed(file, b"", TENSORS._replace(version=99))
    assert same_tensors(cached_tensors(tmp_path, SETTINGS, Decoder()), Decoder()())
    assert "format version 99" in caplog.text


def test_of_many_processes_one_decodes(tmp_path: Path) -> None:
    """This one asks while another one decodes."""
    begun = tmp_path / "begun.txt"

    def decode() -> dict[str, torch.Tensor]:
        begun.touch()
        time.sleep(0.3)
        return {"x": torch.ones(3)}

    def ask() -> None:
        assert float(cached_tensors(tmp_path, {}, decode)["x"].sum()) == 3.0

    with twin(ask) as worker:
        while not begun.exists():
            assert worker.poll() is None
            time.sleep(0.01)
        tensors = cached_tensors(tmp_path, {}, lambda: pytest.fail("decoded again"))
        assert float(tensors["x"].sum()) == 3.0
        assert worker.wait() == 0
