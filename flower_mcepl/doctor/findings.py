"""Findings of checks, each with a remedy; an error in a check is a finding, too."""

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, final

from flower_mcepl.errors import FlowerMceplError

OK, WARNING, FAILED = "ok", "warning", "failed"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str  # its name, in kebab-case
    status: str  # OK, WARNING or FAILED
    found: str  # one line
    remedy: str = ""  # what to do, unless it is ok
    # the same for a script: JSON-able, keys in snake_case
    values: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON-able object."""
        return {
            "check": self.check,
            "status": self.status,
            "found": self.found,
            "remedy": self.remedy,
            "values": dict(self.values),
        }


@final
class Examination:
    """One check: a block that reports a finding; its errors become one, silence is ok.

    What the block prints, as an app's functions may, goes to standard error.

    Parameters
    ----------
    check : str
        Name of the check.
    remedy : str
        What to do if the block raises.
    """

    def __init__(self, check: str, *, remedy: str) -> None:
        self._check, self._remedy = check, remedy
        self._finding: Finding | None = None
        self._output: contextlib.redirect_stdout[Any] | None = None

    @property
    def finding(self) -> Finding:
        """What was found; the block has ended."""
        assert self._finding is not None
        return self._finding

    @property
    def failed(self) -> bool:
        """Whether the checks that build on this one must be left out."""
        return self.finding.status == FAILED

    def ok(self, found: str, **values: Any) -> None:
        """Report that all is well."""
        self._finding = Finding(self._check, OK, found, values=values)

    def warn(self, found: str, remedy: str, **values: Any) -> None:
        """Report what a run survives, but a person should know."""
        self._finding = Finding(self._check, WARNING, found, remedy, values)

    def fail(self, found: str, remedy: str, **values: Any) -> None:
        """Report what a run would fail of."""
        self._finding = Finding(self._check, FAILED, found, remedy, values)

    def __enter__(self) -> "Examination":
        self._output = contextlib.redirect_stdout(sys.stderr)
        self._output.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        assert self._output is not None
        self._output.__exit__(kind, error, trace)
        if error is None:
            self._finding = self._finding or Finding(self._check, OK, "")
            return False
        # an app may call sys.exit as it is imported; Ctrl-C passes
        if not isinstance(error, Exception | SystemExit):
            return False
        text = " ".join(str(error).split())
        trouble = (
            text
            if isinstance(error, FlowerMceplError) and text
            else f"{type(error).__name__}: {text or 'no reason'}"
        )
        self.fail(trouble, self._remedy)
        return True
