"""``flower-mcepl predict`` on files that a person may have."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from flower_mcepl.cli import app as command_line
from flower_mcepl.personal import personal_bytes, reference_to
from flower_mcepl.personal.inputs import examples
from flower_mcepl.personal.reading import opened

SHAPE = (3, 8, 8)
PIXELS = {"mean": [0.5], "std": [0.25]}


def image_net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


def model_fn() -> nn.Module:
    torch.manual_seed(0)
    return image_net()


def write(folder: Path, *, task: str = "classification", **facts: Any) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    module = image_net()
    named = {"network": reference_to(model_fn), "task": task, **facts}
    data = personal_bytes(module, facts=named, input_shape=(1, *SHAPE))
    (folder / "a.mask").write_bytes(data)
    return folder / "a.mask", opened(data, where="x").network(image_net)


def predict(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(command_line, ["predict", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output if code == 0 else str(result.exception)


def rows_of(*arguments: str | Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(predict(*arguments, "--json"))
    return rows


def expected(network: nn.Module, inputs: torch.Tensor) -> list[tuple[int, float]]:
    probabilities = network(inputs).softmax(1)
    return [(int(row.argmax()), pytest.approx(float(row.max()))) for row in probabilities]


def test_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    model, network = write(tmp_path)
    inputs = torch.randn(70, *SHAPE)
    np.save(tmp_path / "all.npy", inputs.numpy())
    np.save(tmp_path / "one.npy", inputs[0].double().numpy())
    np.savez(tmp_path / "two.npz", left=inputs[1], right=inputs[2:4])
    files = [tmp_path / name for name in ("all.npy", "one.npy", "two.npz")]
    rows = rows_of(model, *files)
    known = expected(network, torch.cat([inputs, inputs[:4]]))
    assert [(row["class"], row["probability"]) for row in rows] == known
    assert [row["input"] for row in rows[69:]] == [
        *(f"{files[0]}[69]", f"{files[1]}"),
        *(f"{files[2]}:left", f"{files[2]}:right[0]", f"{files[2]}:right[1]"),
    ]


def test_a_table_has_a_line_for_each_input(tmp_path: Path) -> None:
    model, network = write(tmp_path)
    inputs = torch.randn(2, *SHAPE)
    np.save(tmp_path / "x.npy", inputs.numpy())
    head, *lines = predict(model, tmp_path / "x.npy").splitlines()
    assert head.split() == ["input", "class", "probability"]
    best, probability = expected(network, inputs)[1]
    name, shown, share = lines[1].split()
    assert (name, int(shown)) == (f"{tmp_path / 'x.npy'}[1]", best)
    assert float(share) == pytest.approx(probability.expected, abs=1e-4)


@pytest.mark.parametrize("by", ["file", "options"])
def test_images_become_inputs_by_mean_and_deviation(tmp_path: Path, by: str) -> None:
    image = pytest.importorskip("PIL.Image")
    model, network = write(tmp_path, **({"pixels": PIXELS} if by == "file" else {}))
    values = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "notes.txt").write_bytes(b"no image")
    for number, picture in enumerate(values):
        image.fromarray(picture).save(folder / f"{number}.png")
    inputs = (torch.from_numpy(values).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    options = () if by == "file" else ("--mean", "0.5,0.5,0.5", "--std", ".25")
    rows = rows_of(model, folder, *options)
    assert [(row["class"], row["probability"]) for row in rows] == expected(network, inputs)
    assert [Path(row["input"]).name for row in rows] == ["0.png", "1.png"]


def pictures(folder: Path) -> dict[str, Path]:
    """Images that are more than one picture of opaque pixels of 8 bits."""
    image = pytest.importorskip("PIL.Image")
    levels = np.linspace(0, 60_000, 64).reshape(8, 8)
    colors = np.zeros((8, 8, 4), np.uint8)
    gray = [image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 250)]
    found = {
        "16 bits.png": image.fromarray(levels.astype(np.uint16)),
        "whole numbers.tif": image.fromarray(levels.astype(np.int32)),
        "floats.tif": image.fromarray(levels.astype(np.float32)),
        "transparent.png": image.fromarray(colors),
        "gray and alpha.png": image.fromarray(colors[..., :2]),
        "ink.jpg": image.fromarray(colors[..., :3]).convert("CMYK"),
    }
    for name, picture in found.items():
        picture.save(folder / name)
    gray[0].convert("P").save(folder / "transparent.gif", transparency=10)
    gray[0].save(folder / "transparent gray.png", transparency=10)
    for name in ("pages.tif", "film.gif"):
        gray[0].save(folder / name, save_all=True, append_images=gray[1:])
    return {path.name: path for path in folder.iterdir()}


def test_images_whose_pixels_are_no_opaque_bytes_are_refused(tmp_path: Path) -> None:
    model, _ = write(tmp_path, pixels=PIXELS)
    folder = tmp_path / "images"
    folder.mkdir()
    modes = {
        "16 bits.png": "of Pillow's mode I;16",
        "whole numbers.tif": "of Pillow's mode I",
        "floats.tif": "of Pillow's mode F",
        "transparent.png": "of Pillow's mode RGBA",
        "gray and alpha.png": "of Pillow's mode LA",
        "ink.jpg": "of Pillow's mode CMYK",
        "transparent.gif": "of mode P with transparent pixels",
        "transparent gray.png": "of mode L with transparent pixels",
        "pages.tif": "a file of 2 pages",
        "film.gif": "a file of 2 pages",
    }
    paths = pictures(folder)
    assert paths.keys() == modes.keys()
    for name, path in paths.items():
        text = predict(model, path, code=1)
        assert text.startswith("an image must be one picture of opaque pixels of 8 bits"), name
        assert f"(Pillow's modes L, RGB, P); {name} is {modes[name]}. Save it as an array" in text


def test_palettes_and_gray_are_what_a_viewer_shows(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    model, network = write(tmp_path, pixels=PIXELS)
    gray = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    image.fromarray(gray).save(tmp_path / "gray.png")
    palette = image.frombytes("P", (8, 8), (gray % 4).tobytes())
    palette.putpalette([200, 30, 10, 0, 255, 0, 7, 7, 90, 1, 2, 3])
    palette.save(tmp_path / "palette.png")
    colors = np.array([[200, 30, 10], [0, 255, 0], [7, 7, 90], [1, 2, 3]], np.uint8)[gray % 4]
    values = np.stack([np.stack([gray] * 3, axis=2), colors])
    inputs = (torch.from_numpy(values).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    rows = rows_of(model, tmp_path / "gray.png", tmp_path / "palette.png")
    assert [(row["class"], row["probability"]) for row in rows] == expected(network, inputs)


def test_an_image_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    turned = image.new("L", (6, 4))  # 4 high, and 6 high for a viewer
    turned.putpixel((0, 0), 255)
    exif = turned.getexif()
    exif[0x0112] = 6  # Orientation: its first row is the right side
    turned.save(tmp_path / "turned.png", exif=exif)
    pixels = {"mean": [0.0], "std": [1.0]}
    ((_, tensor),) = examples([tmp_path / "turned.png"], (1, 6, 4), pixels)
    assert tensor.nonzero().tolist() == [[0, 0, 3]]


def test_other_tasks_have_other_answers(tmp_path: Path) -> None:
    inputs = torch.randn(1, *SHAPE)
    np.save(tmp_path / "x.npy", inputs.numpy())
    model, network = write(tmp_path, task="regression")
    (row,) = rows_of(model, tmp_path / "x.npy")
    assert row["outputs"] == pytest.approx(network(inputs)[0].tolist())
    assert "outputs" in predict(model, tmp_path / "x.npy")


def test_inputs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    model, _ = write(tmp_path)
    np.save(tmp_path / "small.npy", np.zeros((3, 7, 8), np.float32))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    np.save(tmp_path / "odd.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "small.npy").read_bytes()[:-1])
    (tmp_path / "bad.png").write_bytes(b"no image")
    image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "tall.png")
    (tmp_path / "empty").mkdir()
    pixels = ("--mean", ".5", "--std", ".5")
    for arguments, what in (
        (["small.npy"], r"one input of shape (3, 8, 8), or a batch of them; got (3, 7, 8)"),
        (["text.npy"], "must hold numbers"),
        (["odd.npy"], "no readable array"),
        (["cut.npy"], "no readable array"),
        (["none.npy"], "no readable array"),
        (["x.txt"], "got x.txt"),
        (["empty"], "holds no file"),
        (["tall.png"], "does not say how. Say it with --mean and --std"),
        (["tall.png", *pixels], "has 9 x 8"),
        (["bad.png", *pixels], "no readable image"),
        (["bad.png", "--mean", "1,2", "--std", "1"], "no readable image"),
        (["tall.png", "--mean", "1"], "belong together"),
        (["tall.png", "--mean", "x", "--std", "1"], "is one number, or one a channel"),
        (["tall.png", "--mean", "1", "--std", "0"], "must not be 0"),
    ):
        first, *options = arguments
        assert what in predict(model, tmp_path / first, *options, code=1), arguments


def test_numbers_are_what_they_are_in_any_type(tmp_path: Path) -> None:
    model, network = write(tmp_path)
    inputs = torch.randint(9, (2, *SHAPE)).float()
    for number, dtype in enumerate((">f4", ">i4", ">f8", "<u2", np.longdouble)):
        np.save(tmp_path / f"{number}.npy", inputs.numpy().astype(dtype))
        found = rows_of(model, tmp_path / f"{number}.npy")
        assert [(row["class"], row["probability"]) for row in found] == expected(network, inputs)


def test_damaged_archives_and_boasting_arrays_are_refused(tmp_path: Path) -> None:
    model, _ = write(tmp_path)
    np.savez(tmp_path / "whole.npz", a=np.zeros(SHAPE, np.float32))
    data = bytearray((tmp_path / "whole.npz").read_bytes())
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    data[300] ^= 255
    (tmp_path / "flipped.npz").write_bytes(data)
    with open(tmp_path / "vast.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**13, *SHAPE)}
        np.lib.format.write_array_header_1_0(file, header)
    for name in ("cut.npz", "flipped.npz", "vast.npy"):
        assert "no readable array of numbers" in predict(model, tmp_path / name, code=1)


@pytest.mark.parametrize("pixels", [5, "mean", {"mean": 5}, {"mean": ["x"], "std": [1]}])
def test_pixels_that_a_stranger_wrote_are_looked_at(pixels: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    model, _ = write(tmp_path, pixels=pixels)
    image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "x.png")
    assert "by no lists of numbers" in predict(model, tmp_path / "x.png", code=1)


def test_the_networks_code_is_imported_from_the_app(tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "mcepl_predict_probe.py").write_text(
        "from torch import nn\n\n\ndef model_fn():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))\n"
    )
    fact = {"reference": "mcepl_predict_probe:model_fn", "config": {}}
    model, _ = write(tmp_path, network=fact)
    np.save(tmp_path / "x.npy", np.zeros(SHAPE, np.float32))
    assert "cannot be imported here" in predict(model, tmp_path / "x.npy", code=1)
    assert len(rows_of(model, tmp_path / "x.npy", "--app", app)) == 1
