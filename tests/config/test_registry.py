"""Names that installed packages add: loaded late, checked, refused where two clash."""

import sys
from pathlib import Path

import pytest

from flower_mcepl.config.registry import Registry, _installed
from flower_mcepl.errors import ConfigError, TopologyError
from tests.fleet import installed

GROUP = "flower_mcepl.tests"


def registry(**built_in: str) -> Registry[int]:
    return Registry(GROUP, int, built_in, noun="number", error=TopologyError)


@pytest.fixture(autouse=True)
def fresh_look() -> None:
    _installed.cache_clear()


def install(folder: Path, package: str, entries: str, module: str = "") -> None:
    installed.install(folder, package, f"[{GROUP}]\n{entries}", module)


def test_built_in_entries_come_in_their_order_and_load_when_asked() -> None:
    numbers = registry(late="no_such_module:x", pid="errno:EPERM", other="errno:ENOENT")
    assert list(numbers) == ["late", "pid", "other"]
    assert len(numbers) == 3
    assert (numbers["pid"], numbers["other"]) == (1, 2)
    assert "late" in numbers
    with pytest.raises(TopologyError, match=r"'late' cannot be loaded from flower_mcepl.*no_such"):
        numbers.find("late")


def test_an_unknown_name_is_refused_with_the_closest_one() -> None:
    with pytest.raises(
        TopologyError, match=r"unknown number 'pit'; known: pid. Did you mean 'pid'"
    ):
        registry(pid="errno:EPERM").find("pit")


def test_a_package_adds_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "six_package", "six = six_package:SIX", "SIX = 6")
    monkeypatch.syspath_prepend(tmp_path)
    numbers = registry(pid="errno:EPERM")
    assert list(numbers) == ["pid", "six"]
    assert "six" in numbers
    assert "six_package" not in sys.modules
    assert numbers["six"] == 6


def test_an_entry_of_another_type_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "text_package", "six = text_package:SIX", "SIX = 'six'")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        TopologyError, match=r"must be a int; 'six' from package text_package .*str"
    ):
        registry().find("six")


def test_a_name_that_two_packages_give_is_refused_and_others_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(
        tmp_path, "one_package", "pid = one_package:ONE\nsix = one_package:SIX", "ONE, SIX = 1, 6"
    )
    install(
        tmp_path, "two_package", "six = two_package:SIX\ntwo = two_package:TWO", "SIX, TWO = 6, 2"
    )
    monkeypatch.syspath_prepend(tmp_path)
    numbers = registry(pid="errno:EPERM")
    assert (list(numbers), len(numbers)) == (["pid", "six", "two"], 3)
    with pytest.raises(TopologyError, match=r"'pid' comes from flower_mcepl .*package one_package"):
        numbers.find("pid")
    with pytest.raises(TopologyError, match=r"'six' comes from package one_package .*two_package"):
        numbers.find("six")
    assert numbers["two"] == 2


def test_an_error_is_a_config_error_unless_another_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown number"):
        Registry(GROUP, int, {}, noun="number").find("six")


def test_it_is_a_mapping() -> None:
    numbers = registry(pid="errno:EPERM")
    assert dict(numbers) == {"pid": 1}
    assert numbers.get("six", 6) == 6
    with pytest.raises(KeyError):
        numbers["six"]


def test_it_names_the_package_that_adds_an_entry_without_loading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "late_package", "six = late_package:SIX\npid = late_package:PID")
    monkeypatch.syspath_prepend(tmp_path)
    numbers = registry(pid="errno:EPERM", other="errno:ENOENT")
    assert (numbers.package("six"), numbers.package("other")) == ("late_package", None)
    assert "late_package" not in sys.modules
    with pytest.raises(TopologyError, match=r"unknown number 'sixx'.*Did you mean 'six'"):
        numbers.package("sixx")
    with pytest.raises(TopologyError, match="names must be unique; 'pid' comes from"):
        numbers.package("pid")
