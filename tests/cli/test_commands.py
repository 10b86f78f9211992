"""The command line, as a person uses it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
import torch
import typer
from typer.testing import CliRunner

import flower_mcepl
from flower_mcepl import Topology, encode_frame, simulate
from flower_mcepl.cli import app, main
from flower_mcepl.record.writing import RunRecord
from flower_mcepl.studies import read_study
from flower_mcepl.wire import Reference
from tests.fleet.agents import make_fleet
from tests.fleet.study_app import write_app, write_study


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three agents that kept its frames."""
    record = RunRecord.create(
        tmp_path_factory.mktemp("runs"), name="ring", config={}, with_frames=True
    )
    simulate(make_fleet(3), Topology.ring(3), num_rounds=4, key_interval=2, record=record)
    return record.path


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_frame_explains_a_whole_frame(record: Path) -> None:
    text = run("frame", record / "frames" / "00001-agent-0002.frame")
    size = (record / "frames" / "00001-agent-0002.frame").stat().st_size
    assert "agent 2, round 1, wire version 4" in text
    assert "whole" in text
    assert f"{size} B" in text
    assert "frozen weights" in text
    for name, shape in make_fleet(1)[0].layers.items():
        assert name in text
        assert "x".join(map(str, shape)) in text


def test_frame_names_the_layers_of_a_delta_by_a_whole_frame_beside_it(
    record: Path, tmp_path: Path
) -> None:
    file = record / "frames" / "00003-agent-0000.frame"
    text = run("frame", file)
    assert "delta: it builds on the frame of round 2" in text
    assert "names and shapes from 00001-agent-0000.frame" in text
    assert all(name in text for name in make_fleet(1)[0].layers)

    alone = tmp_path / "alone.frame"
    alone.write_bytes(file.read_bytes())
    assert "--like" in run("frame", alone)
    like = run("frame", alone, "--like", record / "frames" / "00001-agent-0001.frame")
    assert like.splitlines()[:4] == text.splitlines()[:4]


def test_names_of_layers_in_a_frame_reach_no_terminal_as_they_are(tmp_path: Path) -> None:
    layers = {"con\x1b]52;c;Zm9v\x07v\n": torch.ones(3, dtype=torch.bool)}
    data = encode_frame(layers, sender=0, round=1, fingerprint="0" * 32)
    (tmp_path / "evil.frame").write_bytes(data)
    text = run("frame", tmp_path / "evil.frame")
    assert r"con\x1b]52;c;Zm9v\x07v\n" in text
    assert all(char.isprintable() or char == "\n" for char in text)


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pictures be composed and not drawn, which takes most of their time."""
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "savefig", lambda *args, **options: None)


@pytest.mark.usefixtures("no_pixels")
def test_every_command_says_that_a_record_has_lost_lines(record: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    damaged = Path(shutil.copytree(record, tmp_path / "damaged"))
    for file in ("rounds.jsonl", "relay.jsonl"):
        lines = (damaged / file).read_text().splitlines(keepends=True)
        (damaged / file).write_text("".join(lines[:-2]))
    said = "rounds.jsonl has lost 2 of its 3 lines; relay.jsonl has lost 2 of its 5 lines"
    assert f"[DAMAGED: {said}]" in run("show", damaged).splitlines()[0]
    for command in ("compare", "plot", "tensorboard"):
        out = () if command == "compare" else ("--out", tmp_path / command)
        assert f"WARNING: damaged: {said}" in run(command, damaged, *out)
    assert "WARNING" not in run("compare", record)
    page = tmp_path / "page.html"
    run("report", damaged, "--out", page)
    assert page.read_text().count(said) == 2  # in the notes and the run's own headline


@pytest.mark.usefixtures("no_pixels")
def test_a_metric_is_no_path(record: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(record, tmp_path / "a" / "copy"))
    lines = [json.loads(line) for line in (copy / "rounds.jsonl").read_text().splitlines()]
    config = json.loads((copy / "config.json").read_text())
    for agent in config["agents"]:
        agent["main_metric"] = "../../$\\frac"
    for line in lines:
        line["metrics"] = {"../../$\\frac": 0.5}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("plot", copy, "--out", tmp_path / "b" / "pictures")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert (tmp_path / "b" / "pictures" / "frac-rounds.png").exists()


def test_frame_takes_no_names_from_another_model(record: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.frame"
    alone.write_bytes((record / "frames" / "00003-agent-0000.frame").read_bytes())
    (tmp_path / "other.frame").write_bytes(
        encode_frame({}, sender=0, round=1, fingerprint="0" * 32)
    )
    (tmp_path / "noise.frame").write_bytes(b"noise")
    assert "--like" in run("frame", alone)


def test_frame_explains_every_kind_of_layer(tmp_path: Path) -> None:
    import torch

    file = tmp_path / "kinds.frame"
    sparse = torch.tensor([[0.0, 2.0], [3.0, 0.0]]).to_sparse_coo().coalesce()
    tensors = {
        "mask": torch.ones(9, dtype=torch.bool),
        "dense": torch.zeros(3),
        "sparse": sparse,
        "one": torch.tensor(1.0),
    }
    file.write_bytes(
        encode_frame(
            tensors, sender=0, round=1, fingerprint="0" * 32, precision="float16", packed=True
        )
    )
    text = run("frame", file)
    assert "1 bit a weight, 2 float16 values" in text
    assert "scalar" in text


def test_frame_explains_differences(tmp_path: Path) -> None:
    import torch

    for round in (1, 2):
        tensors = {"weight": torch.full((10, 10), float(round)), "degree": torch.ones(1)}
        before = Reference(
            round - 1, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        )
        data = encode_frame(
            tensors,
            sender=0,
            round=round,
            fingerprint="0" * 32,
            reference=before,
            precision="int8-differences",
        )
        (tmp_path / f"{round}.frame").write_bytes(data)
    whole, delta = run("frame", tmp_path / "1.frame"), run("frame", tmp_path / "2.frame")
    assert "whole: it builds on the common first payload" in whole
    assert "delta: it builds on the frame of round 1" in delta
    for text in (whole, delta):
        rows = [line.split() for line in text.splitlines()]
        assert ["weight", "10x10", "100", "int8-differences"] in rows
        assert ["degree", "1", "1", "float32"] in rows


def test_show_prints_the_table_of_a_record(record: Path) -> None:
    text = run("show", record)
    assert "personalized accuracy" in text
    assert "bits per weight, mean over all frames" in text
    assert "training / test examples of each class" in text


HEAVY = {"torch", "numpy", "flwr", "ray", "matplotlib", "networkx"}


def loaded_by(*commands: Sequence[str | Path]) -> list[set[str]]:
    """Heavy packages that a fresh interpreter holds after each command, in turn."""
    code = f"""
import sys
from flower_mcepl.cli import main
for arguments in {[list(map(str, command)) for command in commands]}:
    sys.argv = ["flower-mcepl", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end
    print("\\nloaded", *({HEAVY} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("loaded")]
    assert len(lines) == len(commands)
    return [set(line) for line in lines]


@pytest.mark.slow
def test_what_reads_records_loads_no_torch_but_over_lasso_for_the_masks(
    record: Path, tmp_path: Path
) -> None:
    for number in (0, 1):
        folder = Path(shutil.copytree(record, tmp_path / str(number)))
        config = json.loads((folder / "config.json").read_text())
        config["run_config"] = {"group-lasso": number / 100}
        (folder / "config.json").write_text(json.dumps(config))
    assert "filters off" in " ".join(run("compare", tmp_path).split())
    *without, over_lasso, frame = loaded_by(
        ["--version"],
        ["--help"],
        ["show", record],
        ["compare", record.parent, "--target", "0.01"],
        ["compare", tmp_path],
        ["frame", record / "frames" / "00001-agent-0002.frame"],
    )
    assert without == [set()] * 4
    assert over_lasso == {"torch", "numpy"}
    assert frame >= {"torch", "numpy"}


def test_the_version_is_printed() -> None:
    assert run("--version") == f"flower-mcepl {flower_mcepl.__version__}\n"


EXAMPLES = Path(__file__).parents[2] / "examples"
QUICKSTART = EXAMPLES / "quickstart"


def test_data_shows_who_would_hold_what(tmp_path: Path) -> None:
    pytest.importorskip("flwr_datasets")
    picture = tmp_path / "new" / "who.png"
    more = (
        "--run-config",
        'num-agents=5 partition="linear"',
        "--run-config",
        "train-fraction=0.5 validation-fraction=0.1",
    )
    text = run("data", QUICKSTART, *more, "--out", picture)
    rows = [
        line.split()
        for line in text.splitlines()
        if line.split()[:1] in [[str(agent)] for agent in range(5)]
    ]
    assert len(rows) == 5
    sums = [[int(number) for number in " ".join(row).split(" / ")[-2:]] for row in rows]
    # a fifth of 1797 * (i + 1) / 15, rounded up
    assert [sizes[-1] for sizes in sums] == [24, 48, 72, 96, 121]
    assert "training / validation / test examples of each class" in text
    assert f"picture: {picture}" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_data_reads_settings_from_a_file(tmp_path: Path) -> None:
    pytest.importorskip("flwr_datasets")
    (tmp_path / "two.toml").write_text('num-agents = 2\ntopology = "ring"\n[dsgd]\nlr = 0.1\n')
    text = run("data", QUICKSTART, "--run-config", tmp_path / "two.toml")
    assert len([line for line in text.splitlines() if " / " in line]) == 3
    assert "training / test examples" in text


def test_data_without_classes_shows_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    app = EXAMPLES / "regression"
    lines = [line.split() for line in run("data", app).splitlines()]
    assert lines[0] == "agent training examples test examples".split()
    assert [row[0] for row in lines[2:]] == [str(agent) for agent in range(10)]
    assert sum(int(row[1]) + int(row[2]) for row in lines[2:]) == 442  # scikit-learn's diabetes
    picture = tmp_path / "who.png"
    monkeypatch.setattr("sys.argv", ["flower-mcepl", "data", str(app), "--out", str(picture)])
    with pytest.raises(SystemExit):
        main()
    assert "tell none at little cost. Leave it out" in capsys.readouterr().err
    assert not picture.exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("partition='exponential'", "agent 0 would get no example"),
        ("partition='iid:x=1'", "unknown parameter of iid 'x'"),
        ("partitions='iid'", "Did you mean 'partition'"),
        ("partition=iid", "is 'key=value"),
        ("partition", "is 'key=value"),
        ("evaluate-on='validation'", "validation-fraction > 0"),
    ],
)
def test_data_tells_what_is_wrong(
    settings: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flwr_datasets")
    monkeypatch.setattr(
        "sys.argv", ["flower-mcepl", "data", str(QUICKSTART), "--run-config", settings]
    )
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_help_names_every_command() -> None:
    text = run("--help")
    for command in ("run", "data", "compare", "plot", "report", "show", "frame"):
        assert f"  {command} " in text


def test_help_of_a_command_shows_how() -> None:
    assert "[grid]" in run("run", "--help")
    assert "flower-mcepl run examples/paper/2-ablation.toml --dry-run\n" in run("run", "--help")
    assert "--target 0.9\n" in run("compare", "--help")
    assert "flower-mcepl data examples/quickstart\n" in run("data", "--help")


COMMANDS = typer.main.get_command(app)
assert isinstance(COMMANDS, click.Group)


@pytest.mark.parametrize("command", [None, *COMMANDS.commands])
def test_help_shows_brackets_and_the_text_of_every_argument_once(command: str | None) -> None:
    text = run(*filter(None, [command]), "--help")
    assert "\\[" not in text
    if command is None:
        return
    parameters = COMMANDS.commands[command].params
    arguments = [one for one in parameters if one.param_type_name == "argument"]
    assert text.count("rguments:") == min(1, len(arguments))
    for argument in arguments:
        assert " ".join(str(argument.help).split()) in " ".join(text.split())
        assert ("[required]" in text) == argument.required


# One a worker: worksteal may come back to this file, and a process has one module of
# a name.
@pytest.fixture(scope="session")
def study_app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_app(tmp_path_factory.mktemp("apps"), "cli")


def test_run_lists_then_runs_then_skips(study_app: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path, study_app, "[grid]\nalgorithm = ['mcepl', 'dsgd']\n")
    assert "2 runs, 2 to do, engine in-process" in run("run", study, "--dry-run")
    assert not (tmp_path / "out").exists()

    text = run("run", study)
    assert "study: 2 runs, 0 finished, 2 to do" in text
    lines = [line for line in text.splitlines() if "over the links" in line and "left" in line]
    assert [line.split()[0] for line in lines] == ["1/2", "2/2"]
    assert all("accuracy 0." in line for line in lines)
    assert "compare.md" in text
    assert "the app talks" not in text

    assert "2 runs, 2 finished, 0 to do" in run("run", study)
    assert "2 runs, 0 to do" in run("run", study, "--dry-run")
    assert (
        (tmp_path / "out" / "compare.md")
        .read_text()
        .splitlines()[0]
        .startswith("| algorithm | seeds |")
    )


def test_run_names_a_record_that_cannot_be_read_before_it_replaces_it(
    study_app: Path, tmp_path: Path
) -> None:
    study = write_study(tmp_path, study_app, "")
    assert "WARNING" not in run("run", study)
    (rounds,) = (tmp_path / "out").glob("*/rounds.jsonl")
    rounds.write_text("[1]\n" + rounds.read_text())
    text = " ".join(run("run", study).split())
    assert f"WARNING: {rounds.parent.name} cannot be read, so its run is done again" in text
    assert "rounds.jsonl, line 1" in text
    assert "1 runs, 1 finished, 0 to do" in run("run", study)


def test_run_with_a_failure_ends_with_1_and_goes_on_next_time(
    study_app: Path, tmp_path: Path
) -> None:
    study = write_study(tmp_path, study_app, "[grid]\ncrash = [true, false]\n")
    for done in ("2 to do", "1 to do"):
        result = CliRunner().invoke(app, ["run", str(study)], catch_exceptions=False)
        assert result.exit_code == 1
        assert done in result.output
        assert (
            f"failed: 1 of {done[0]} runs; the same command tries them again:\n  crash-True_"
            in result.output
        )
        assert "crashes on purpose" in result.output


def test_ctrl_c_says_how_to_go_on(
    study_app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write_study(tmp_path, study_app, "[grid]\nseed = [1, 2]\n")
    monkeypatch.setattr("flower_mcepl.cli.run._reached", stop := Stopper())
    result = CliRunner().invoke(app, ["run", str(study)], catch_exceptions=False)
    assert stop.called
    assert result.exit_code == 130
    assert "stopped; 1 of 2 runs are finished. The same command goes on from here." in result.output


class Stopper:
    called = False

    def __call__(self, *_: object) -> str:
        self.called = True
        raise KeyboardInterrupt


def test_compare_prints_and_writes(record: Path, tmp_path: Path) -> None:
    files = tmp_path / "table.md", tmp_path / "table.csv"
    text = run(
        "compare", record.parent, "--target", "0.01", "--markdown", files[0], "--csv", files[1]
    )
    assert "to 0.01" in text
    assert "one seed has none" in text
    assert files[0].read_text().startswith("| seeds |")
    assert files[1].read_text().startswith("seeds,accuracy_mean,")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frame", "{here}"], "no frame"),
        (["frame", "nowhere.frame"], "nowhere.frame"),
        (["show", "nowhere"], "config.json"),
        (["compare", "nowhere"], "config.json"),
        (["plot", "nowhere"], "config.json"),
        (["report", "nowhere"], "config.json"),
        (["report", "{here}"], "test_commands.py, line 1: this is no TOML"),
        (["run", "nowhere.toml"], "nowhere.toml cannot be read"),
        (["run", "{here}"], "test_commands.py, line 1: this is no TOML"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["flower-mcepl", *(a.format(here=__file__) for a in arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "{empty}/none"], "none does not exist. Check the path."),
        (["show", "{study}"], "holds 3 of them. Name one, such as .* flower-mcepl compare"),
        (["show", "{empty}"], "has no config.json. Check the path."),
        (
            ["compare", "{empty}/none"],
            "a folder with config.json; .*none does not exist. Check the path",
        ),
        (["frame", "{empty}"], "a frame is a file, .* is a folder. Name one of the files in it"),
        (["run", "examples/quickstart"], "examples/quickstart is an app. Run it once with `python"),
    ],
)
def test_a_path_of_another_kind_is_refused_with_the_way_out(
    arguments: list[str],
    message: str,
    small_study: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"empty": tmp_path, "study": read_study(small_study).out}
    filled = [argument.format(**places) for argument in arguments]
    monkeypatch.setattr("sys.argv", ["flower-mcepl", *filled])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert re.search(message, capsys.readouterr().err)
