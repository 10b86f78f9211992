"""How Sphinx builds the site: ``make docs``.

The sources are the Markdown files of the repository, where they lie, so that one link
works on a forge and on the site alike. The README is the first page.
"""

import importlib
import inspect
import shutil
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

sys.path.insert(0, str(Path(__file__).parent))
import reference

PACKAGE = "flower_mcepl"
ROOMS = "agents clients strategies topology data masks wire personal".split()
ROOMS += "config record studies launch".split()
FACES = [PACKAGE, *(f"{PACKAGE}.{room}" for room in ROOMS)]  # what is public

CONTENTS = {
    "Use it": [
        "docs/getting-started",
        "docs/pretrained",
        "docs/how-it-works",
        "docs/existing-apps",
        "docs/configuration",
        "docs/algorithms",
        "docs/topologies",
        "docs/schedules",
        "docs/data",
        "docs/tasks",
        "docs/studies",
        "docs/personal-models",
        "docs/commands",
        "docs/results",
        "docs/benchmarks",
    ],
    "Run it on devices": ["docs/deployment", "docs/resume", "docs/security"],
    "Examples": [
        "examples/quickstart/README",
        "examples/pretrained/README",
        "examples/regression/README",
        "examples/sequences/README",
        "examples/drop_in/README",
        "examples/cifar10/README",
        "examples/deployment/README",
        "examples/paper/README",
        "examples/extension/README",
    ],
    "Reference": [
        "docs/run-record",
        "docs/wire-format",
        "docs/mask-file",
        *(f"docs/api/{face.rpartition('.')[2]}" for face in FACES),
    ],
    "Develop it": ["docs/extending", "CONTRIBUTING", "benchmarks/README", "CHANGELOG"],
}

project = PACKAGE
html_title = PACKAGE
copyright = "the flower_mcepl maintainers, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "examples/*/README.md", "benchmarks/README.md"]
# folders that Sphinx need not search
exclude_patterns = [".*", "build", "dist", "runs", "tests", PACKAGE, "clients", "strategies"]

myst_heading_anchors = 3  # as forges make them
default_role = "py:obj"  # `Name` in a docstring is a link where it can be one
autodoc_member_order = "groupwise"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "imported-members": True}
python_maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_copy_source = False

_log = logging.getLogger(__name__)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the steps below; Sphinx calls this."""
    load_lazy_names()
    app.connect("source-read", add_contents)
    app.connect("autodoc-skip-member", skip_constants)
    app.connect("autodoc-process-docstring", explain_fields, priority=100)  # before napoleon
    app.connect("missing-reference", find_by_last_names)
    app.connect("build-finished", check_public_names)
    app.connect("build-finished", make_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def load_lazy_names() -> None:
    """Load what the faces load only when asked; autodoc sees it then in ``dir()``."""
    for face in map(importlib.import_module, FACES):
        vars(face).update({name: getattr(face, name) for name in face.__all__})


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Give the README the table of contents, which it does without on a forge.

    Sphinx warns of a page that no entry leads to.
    """
    if page == root_doc:
        for caption, pages in CONTENTS.items():
            there = (name for name in pages if app.env.doc2path(name).is_file())
            entries = "\n".join(f"/{name}" for name in there)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def skip_constants(
    app: Sphinx, what: str, name: str, value: object, skip: bool, options: object
) -> bool | None:
    """Leave out a face's constants: their pages explain them by hand."""
    is_code = inspect.isclass(value) or inspect.isfunction(value)
    return True if what == "module" and not is_code else None


def explain_fields(
    app: Sphinx, what: str, name: str, value: Any, options: object, lines: list[str]
) -> None:
    """Add a class's fields and the comments beside them to its docstring."""
    if what != "class" or "Attributes" in lines or "Parameters" in lines:
        return
    known = reference.fields(value)
    if known:
        lines += ["", "Attributes", "----------"]
    for field, text in known.items():
        lines += [field, "    " + text.replace("*", r"\*")]


def find_by_last_names(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Element | None:
    """Make `Name` of a docstring a link, where one entry alone ends so."""
    if node.get("refdomain") != "py":
        return None
    end = "." + node["reftarget"]
    entries = [entry for entry in env.get_domain("py").get_objects() if entry[0].endswith(end)]
    places = {(page, anchor) for _, _, _, page, anchor, _ in entries}
    if len(places) != 1:
        return None
    page, anchor = places.pop()
    return make_refnode(app.builder, node["refdoc"], page, anchor, content)


def check_public_names(app: Sphinx, error: Exception | None) -> None:
    """Warn of public names without an entry, and of constants that are not public."""
    if error or app.builder.name != "html":
        return
    kinds = {name: kind for name, _, kind, *_ in app.env.get_domain("py").get_objects()}
    last_names = {name.rpartition(".")[2] for name in kinds}
    for face in FACES:
        names = importlib.import_module(face).__all__
        known = last_names if face == PACKAGE else {n.removeprefix(f"{face}.") for n in kinds}
        for name in set(names) - known:
            _log.warning("%s.%s is public, but no page of docs/api explains it", face, name)
        for name, kind in kinds.items():
            room, _, last = name.rpartition(".")
            if kind == "data" and room == face and last not in names:
                _log.warning("docs/api explains %s, which is not public", name)


def make_index(app: Sphinx, error: Exception | None) -> None:
    """Let a browser find the first page."""
    if not error and app.builder.name == "html":
        shutil.copyfile(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))
