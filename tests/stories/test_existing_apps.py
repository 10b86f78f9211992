"""The shapes of Flower's own example apps, turned with the two lines of the docs."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.client_manager import SimpleClientManager
from flwr.server.server import Server

from flower_mcepl import ConfigError, RosterError, Topology, read_run, shared_module
from flower_mcepl.agents.parts.own_metrics import _log_left_out
from flower_mcepl.cli.data import data
from flower_mcepl.clients import neighbor_average_mod
from flower_mcepl.doctor.app_run import examine_run
from flower_mcepl.record.reading import Run
from flower_mcepl.strategies import GossipStrategy
from tests.fleet.grid import InProcessGrid

ROOT = Path(__file__).parents[2]
APPS = Path(__file__).parent / "apps"
KINDS = sorted(path.stem for path in APPS.glob("[!_]*.py"))
NODES = 3
TWO_LINES = (
    (
        "from flwr.serverapp.strategy import FedAvg\n",
        "from flower_mcepl import Topology\n"
        "from flower_mcepl.clients import neighbor_average_mod\n"
        "from flower_mcepl.strategies import GossipStrategy\n",
    ),
    (r"ClientApp\(\)", "ClientApp(mods=[neighbor_average_mod])"),
    (r"ClientApp\(mods=\[(?!neighbor)", "ClientApp(mods=[neighbor_average_mod, "),
    (r"strategy = FedAvg\(.*\)", "strategy = GossipStrategy(topology=Topology.ring(3))"),
    # of the tutorial, whose strategy is the user's own
    (r"class Decaying\(FedAvg\)", "class Decaying(GossipStrategy)"),
    (r"strategy = Decaying\(\)", "strategy = Decaying(topology=Topology.ring(3))"),
)
SAVING = {  # the lines that make use of a global model, which go, too
    "quickstart_pytorch": (
        "        evaluate_fn=global_evaluate,\n",
        '    torch.save(result.arrays.to_torch_state_dict(), "final_model.pt")\n',
    ),
    "quickstart_tensorflow": (
        "    model.set_weights(result.arrays.to_numpy_ndarrays())\n",
        '    model.save("final_model.keras")\n',
    ),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory, and a home for states, that a test has for itself."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    _log_left_out.cache_clear()


def source(kind: str) -> str:
    return (APPS / f"{kind}.py").read_text()


def turned(text: str) -> str:
    """The app with the two lines and their imports, and nothing else."""
    for before, after in TWO_LINES:
        text = re.sub(before, after, text)
    assert "FedAvg" not in re.sub(r'^""".*?"""', "", text, flags=re.DOTALL)
    return text


def without_saving(kind: str, text: str) -> str:
    for line in SAVING.get(kind, ()):
        assert text.count(line) == 1
        text = text.replace(line, "")
    return text


def load(text: str, name: str = "app_of_a_test") -> ModuleType:
    module = ModuleType(name)
    sys.modules[name] = module  # dataclasses look there
    exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    return module


def play(app: ModuleType, **settings: Any) -> InProcessGrid:
    grid = InProcessGrid(app.client, NODES, settings)
    app.server(grid, Context(1, 0, {}, RecordDict(), settings))
    return grid


def the_run(tmp_path: Path) -> Run:
    (folder,) = (tmp_path / "runs").iterdir()
    return read_run(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_copies_are_apps_for_fedavg(kind: str) -> None:
    grid = play(load(source(kind)))
    assert len(grid.log) == NODES * 2 * (3 if kind == "tutorial" else 2)


METRICS = {
    "quickstart_pytorch": ("accuracy", set()),
    "quickstart_pytorch_lightning": ("loss", set()),
    "quickstart_sklearn": ("accuracy", {"precision", "recall"}),
    "quickstart_jax": ("accuracy", set()),
    "quickstart_tensorflow": ("accuracy", set()),
    "custom_mods": ("accuracy", set()),
    "tutorial": ("loss", set()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_lines_make_it_gossip(kind: str, tmp_path: Path) -> None:
    play(load(without_saving(kind, turned(source(kind)))))
    run = the_run(tmp_path)
    assert run.status == "finished"
    assert all(not line["failed"] and line["answered"] == NODES for line in run.relay)
    if kind == "quickstart_numpy":  # which measures nothing that is known
        assert run.rounds == []
        return
    main, further = METRICS[kind]
    assert run.metric.name == main
    assert run.coverage() == "3 agents"
    for row in run.rounds:
        assert set(row["metrics"]) == further
        assert all(0 <= value <= 1 for value in row["metrics"].values())
        assert np.isfinite(row["loss"])


@pytest.mark.parametrize("kind", SAVING)
def test_who_saves_a_global_model_is_told_where_the_models_are(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"result\.arrays holds none.*agents' models are in"):
        play(load(turned(source(kind))))
    run = the_run(tmp_path)
    assert run.status == "finished"  # saving comes after the run, and costs none of it
    assert not list(tmp_path.glob("final_model*"))
    warned = [m for m in caplog.messages if "evaluate_fn is not called again" in m]
    assert len(warned) == (1 if kind == "quickstart_pytorch" else 0)


def test_metrics_that_are_no_numbers_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    text = turned(source("quickstart_numpy"))
    text = text.replace('"random_metric": RANDOM.random(3).tolist()', '"loss": 1.0, "per": [1.0]')
    play(load(text))
    assert [m for m in caplog.messages if "left out" in m] == [
        m for m in caplog.messages if m.startswith("the evaluate function's per is left out")
    ]
    assert len([m for m in caplog.messages if "left out" in m]) == 1


def test_without_accuracy_and_loss_the_log_says_what_came(
    caplog: pytest.LogCaptureFixture,
) -> None:
    play(load(turned(source("quickstart_numpy"))))
    told = [m for m in caplog.messages if "needs an accuracy or a loss" in m]
    assert len(told) == 1
    assert "metrics are random_metric, num-examples" in told[0]
    assert "or none: (evaluate=False)" in told[0]


def test_mods_of_the_app_see_what_they_saw_under_fedavg() -> None:
    before, after = load(source("custom_mods"), "before"), load(turned(source("custom_mods")))
    play(before)
    play(after)
    named = [[(round, set(written)) for round, _, written in app.LOGGED] for app in (before, after)]
    assert named[0] == named[1]
    assert len(named[1]) == 2 * NODES


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        ("0", r"error 2: KeyError: 'train_loss'\. Mend"),
        ('msg.content["config"]["server-round"]', r"KeyError: 'config'\. .*before its other mods"),
    ],
)
def test_a_mod_before_ours_that_fails_is_named_with_its_exception(read: str, reason: str) -> None:
    text = turned(source("custom_mods")).replace(
        'mods=[neighbor_average_mod, get_writer_mod("runs")]',
        'mods=[get_writer_mod("runs"), neighbor_average_mod]',
    )
    with pytest.raises(RosterError, match=reason):
        play(load(text.replace('msg.content["config"]["server-round"]', read)))


def test_a_strategy_of_the_users_own_changes_what_the_app_is_told() -> None:
    app = load(turned(source("tutorial")))
    play(app)
    assert {(round, lr) for round, lr in app.STEPS} == {(1, 0.5), (2, 0.25), (3, 0.25)}


def test_an_app_for_fedavg_without_the_mod_is_told_so() -> None:
    text = turned(source("quickstart_jax")).replace("mods=[neighbor_average_mod]", "")
    with pytest.raises(RosterError, match=r"KeyError: 'arrays'\. .*needs mods=\[neighb"):
        play(load(text))


def test_a_model_of_another_framework_is_refused_where_masks_are_needed() -> None:
    class KerasModel: ...

    with pytest.raises(ConfigError, match=r"torch network.*here came KerasModel\..*\[neighbor_av"):
        shared_module(KerasModel, seed=1)  # type: ignore[arg-type]


# --- before a run ---

OLDER_CLIENT_APP = "from flwr.clientapp import ClientApp as A\nclient = A(lambda context: None)\n"
CLIENTS = {  # text of the app, status and a word of what doctor and data call it
    "turned": (turned(source("quickstart_jax")), "ok", "averaging by neighbor_average_mod"),
    "plain": (source("quickstart_jax"), "warning", "without neighbor_average_mod"),
    "older": (OLDER_CLIENT_APP, "warning", "older API (client_fn)"),
}


def write_app(folder: Path, kind: str) -> Path:
    app, package = folder / kind, f"existing_{kind}_probe"
    (app / package).mkdir(parents=True)
    (app / package / "__init__.py").write_text(CLIENTS[kind][0])
    (app / "pyproject.toml").write_text(
        f"[project]\nname = '{kind}'\nversion = '1.0.0'\n"
        "[tool.flwr.app]\npublisher = 'us'\n[tool.flwr.app.components]\n"
        f"serverapp = '{package}:server'\nclientapp = '{package}:client'\n"
        "[tool.flwr.app.config]\nlr = 0.5\n"
    )
    return app


@pytest.mark.parametrize("kind", CLIENTS)
def test_doctor_and_data_say_what_an_app_of_its_own_is(kind: str, tmp_path: Path) -> None:
    app, (_, status, words) = write_app(tmp_path, kind), CLIENTS[kind]
    client, node = examine_run(app, {"lr": 0.25}, {"partition-id": 4}, alone=True)
    # no graph, no rounds: nobody has said them
    assert (client.check, client.status, node.found) == ("client-app", status, "agent 4")
    assert words in client.found
    with pytest.raises(ConfigError, match=rf"{re.escape(words)}: its data are not known before"):
        data(app)
    (wrong,) = examine_run(app, {"Lr": 1}, {"partition-id": 0}, alone=True)
    assert "Known keys: lr" in wrong.found
    *_, nobody = examine_run(app, {}, {}, alone=True)
    assert (nobody.status, "counts from 0; got None" in nobody.found) == ("failed", True)


# --- the older API ---

OLDER_TASK = '''
import numpy as np

def train(arrays, step):
    """What a task module exports: the name that a ClientApp's function likes to have."""
    return [array + step for array in arrays]

def test(arrays):
    return float(arrays[0].sum()), 0.5

class Net: ...

def get_weights(net):
    return [np.zeros(2)]
'''
OLDER_CLIENT = """
import numpy as np
from flwr.client import NumPyClient
from flwr.common import Context
from older_task_of_a_test import Net, get_weights, test, train

class FlowerClient(NumPyClient):
    def __init__(self, step):
        self.step = step

    def fit(self, parameters, config):
        return train(parameters, self.step), 10, {"note": "text", "ok": True, "spread": 0.5}

    def evaluate(self, parameters, config):
        loss, accuracy = test(parameters)
        return loss, 4, {"accuracy": accuracy, "f1": np.float32(0.25), "note": "text"}

def make_client(context):
    return FlowerClient(context.node_config["partition-id"])
"""


def recipe() -> str:
    text = (ROOT / "docs" / "existing-apps.md").read_text()
    section = text.partition("## Apps of the older API")[2]
    client, server = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return f"{client}\n{server.replace('ring(10)', f'ring({NODES})')}"


def older_app() -> ModuleType:
    """The app, moved over as the page says: `client_fn` loses its ``.to_client()``."""
    load(OLDER_TASK, "older_task_of_a_test")
    make = (
        "def make_client(context):\n    return FlowerClient(context.node_config['partition-id'])\n"
    )
    return load(f"import numpy as np\n{OLDER_CLIENT}\n{make}\n{recipe()}")


def test_the_recipe_moves_an_app_over_whose_task_exports_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = older_app()
    app.server_app(InProcessGrid(app.app, NODES), Context(1, 0, {}, RecordDict(), {}))
    run = the_run(tmp_path)
    assert run.status == "finished"
    # in a ring of three all hear all: in every round all move by the mean of 0, 1, 2
    assert [(row["round"], row["loss"]) for row in run.rounds] == [(3, 6.0)] * NODES
    assert {row["metrics"]["f1"] for row in run.rounds} == {0.25}
    assert "not recorded, as they are no numbers: note" in capsys.readouterr().out


def test_client_fn_beside_the_mod_says_what_to_do() -> None:
    def client_fn(context: Context) -> Any:
        raise AssertionError

    client = ClientApp(client_fn=client_fn, mods=[neighbor_average_mod])
    with pytest.raises(RosterError, match=r"older API.*docs/existing-apps\.md"):
        GossipStrategy(Topology.ring(2)).start(
            InProcessGrid(client, 2), initial_arrays=ArrayRecord([np.zeros(2)]), num_rounds=1
        )


def test_server_fn_with_our_strategy_says_what_to_do() -> None:
    strategy = GossipStrategy(Topology.ring(NODES))
    parts = ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=1))  # type: ignore[arg-type]
    server = Server(client_manager=SimpleClientManager(), strategy=parts.strategy)
    # what ServerApp does with them
    with pytest.raises(ConfigError, match=r"server_fn.*@app\.main\(\).*GossipStrategy\("):
        server.fit(num_rounds=1, timeout=None)
