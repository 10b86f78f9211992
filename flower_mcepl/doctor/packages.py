"""Python and packages against what the installed flower-mcepl demands."""

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

from flower_mcepl.doctor.findings import Examination, Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PROJECT = "flower-mcepl"
_PURPOSES = {
    "simulation": "`flwr run` on one machine",
    "vision": "the examples' data",
    "report": "plots and reports",
    "tensorboard": "`flower-mcepl tensorboard`",
    "sensors": "memory, battery and temperature, where filters is auto",
}
_NOT_FOR_USERS = ("dev", "all")  # tools of developers, and the sum of the others
# what decides bits and messages: the same on all devices
_SHOWN = ("flower-mcepl", "torch", "numpy", "flwr")
_INSTALL = (
    "Install flower-mcepl anew into this environment: `pip install -e .` in its clone, or `pip "
    "install FILE.whl`."
)


def check_python() -> Finding:
    """Compare the running Python with ``requires-python``."""
    with Examination("python", remedy=_INSTALL) as check:
        from packaging.specifiers import SpecifierSet  # it comes with flwr

        version, demanded = platform.python_version(), metadata.metadata(PROJECT)["Requires-Python"]
        state = f"Python {version}; needed is {demanded}"
        if SpecifierSet(demanded).contains(version, prereleases=True):
            check.ok(state, version=version, needed=demanded)
        else:
            check.fail(
                state,
                "Make the environment with a Python of that range.",
                version=version,
                needed=demanded,
            )
    return check.finding


def check_packages() -> Finding:
    """Compare the packages that every device needs with what is installed."""
    with Examination("packages", remedy=_INSTALL) as check:
        demanded = _demands(PROJECT)
        problems = [problem for requirement in demanded for problem in _problems(requirement)]
        versions = {
            name: _version(name)
            for name in (PROJECT, *(requirement.name for requirement in demanded))
        }
        if problems:
            check.fail("; ".join(problems), _INSTALL, versions=versions)
        else:
            shown = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
            check.ok(f"all {len(demanded)} that a device needs fit: {shown}", versions=versions)
    return check.finding


def check_extras() -> Finding:
    """Check the extras; one of a wrong version is a fault, a missing one is none."""
    with Examination("extras", remedy=_INSTALL) as check:
        extras = metadata.metadata(PROJECT).get_all("Provides-Extra") or []
        states = {extra: _state(extra) for extra in sorted(extras) if extra not in _NOT_FOR_USERS}
        report = "; ".join(f"{extra} {_told(extra, *state)}" for extra, state in states.items())
        installed = {extra: state == "installed" for extra, (state, _) in states.items()}
        wrong = [extra for extra, (state, _) in states.items() if state == "wrong version"]
        if wrong:
            check.warn(
                report,
                f"Where they are needed: `pip install 'flower-mcepl[{','.join(wrong)}]'`.",
                extras=installed,
            )
        else:
            check.ok(report or "none are declared", extras=installed)
    return check.finding


def _state(extra: str) -> tuple[str, list[str]]:
    demanded = _demands(PROJECT, extra)
    problems = [problem for requirement in demanded for problem in _problems(requirement)]
    if not problems:
        return "installed", []
    wrong = [problem for problem in problems if "is missing" not in problem]
    return ("wrong version", wrong) if wrong else ("not installed", problems)


def _told(extra: str, state: str, problems: list[str]) -> str:
    purpose = f", for {_PURPOSES[extra]}" if extra in _PURPOSES else ""
    return f"{state} ({'; '.join(problems)}{purpose})" if problems else state


def _demands(distribution: str, extra: str = "") -> "list[Requirement]":
    """Needs of a distribution on this machine; with an extra, what that adds."""
    from packaging.requirements import Requirement

    needs = [Requirement(line) for line in metadata.requires(distribution) or ()]
    if not extra:
        return [
            need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    added = [
        need
        for need in needs
        if need.marker is not None and not need.marker.evaluate({"extra": ""})
    ]
    return [
        need for need in added if need.marker is not None and need.marker.evaluate({"extra": extra})
    ]


def _problems(need: "Requirement") -> Iterator[str]:
    """Say what is wrong with one package, or with those that its extras add."""
    version = _version(need.name)
    if version is None:
        yield f"{need.name} is missing (needed: {need.specifier or 'any version'})"
    elif not need.specifier.contains(version, prereleases=True):
        yield f"{need.name} is {version} (needed: {need.specifier})"
    else:
        for extra in sorted(need.extras):
            for added in _demands(need.name, extra):
                yield from _problems(added)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
