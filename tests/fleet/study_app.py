"""A small Flower app for studies, and study files over it."""

import textwrap
from pathlib import Path

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "mcepl-study-probe"
version = "1.0.0"
description = "A probe"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "mcepl_study_probe.server_app:app"
clientapp = "mcepl_study_probe.client_app:app"

[tool.flwr.app.config]
algorithm = "mcepl"
num-agents = 4
num-rounds = 2
topology = "ring"
seed = 7
batch-size = 8
score-lr = 1.0
finetune-lr = 1.0
evaluate-every = 1
retention-conv = "0.3"
record-dir = "runs"
crash = false
group-lasso = 0.0
scale = 1.0

[tool.flwr.app.config.dsgd]
lr = 0.1
"""

CLIENT = """
import torch
from torch import nn

from flower_mcepl.clients import make_client_app


def model_fn(context):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def split(number, scale):
    generator = torch.Generator().manual_seed(100 + number)
    labels = torch.randint(3, (24,), generator=generator)
    return scale * torch.randn(24, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1), labels


def data_fn(context):
    print("the app talks")
    if context.run_config["crash"]:
        raise RuntimeError("crashes on purpose")
    agent, scale = context.node_config["partition-id"], context.run_config["scale"]
    return split(agent, scale), split(1000 + agent, scale)


app = make_client_app(model_fn, data_fn)
"""

SERVER = """
from flwr.serverapp import ServerApp

from flower_mcepl.strategies import GossipStrategy

app = ServerApp()


@app.main()
def main(grid, context):
    GossipStrategy.from_run_config(context.run_config, app_keys=["crash", "scale"]).start(grid=grid)
"""


def write_app(folder: Path, name: str = "study") -> Path:
    """An app whose package is ``mcepl_NAME_probe``: one process imports one package of
    a name.
    """
    app = folder / f"mcepl-{name}-probe"
    package = app / f"mcepl_{name}_probe"
    package.mkdir(parents=True)
    settings = PYPROJECT.replace("mcepl_study_probe", package.name).replace(
        "mcepl-study-probe", app.name
    )
    (app / "pyproject.toml").write_text(settings)
    (package / "__init__.py").write_text("")
    (package / "client_app.py").write_text(CLIENT)
    (package / "server_app.py").write_text(SERVER)
    return app


def write_study(folder: Path, app: Path, text: str, *, engine: str = "in-process") -> Path:
    """A study file whose line 4 is the first of `text`; its records go to
    ``folder/out``.
    """
    path = folder / "study.toml"
    head = f'app = "{app}"\nout = "{folder / "out"}"\nengine = "{engine}"\n'
    path.write_text(head + textwrap.dedent(text).lstrip("\n"))
    return path
