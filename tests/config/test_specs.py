"""Settings of one line: options become the arguments of a spec's build."""

from pathlib import Path

import pytest

from flower_mcepl.config.specs import (
    COUNT,
    NUMBER,
    PATH,
    POSITIVE,
    WHOLE,
    Spec,
    lookup,
    one_of,
    parse_spec,
)
from flower_mcepl.errors import ConfigError, TopologyError

CAKE = Spec(
    lambda layers, bake_time=1.0: (layers, bake_time),
    needs={"layers": COUNT},
    takes={"bake-time": POSITIVE, "icing": one_of("red", "blue"), "shift": WHOLE, "heat": NUMBER},
)
KNOWN = {"cake": CAKE, "bread": Spec(lambda: None), "recipe": Spec(str, needs={"file": PATH})}


def parse(text: str) -> tuple[str, dict[str, object]]:
    name, spec, options = parse_spec(text, KNOWN, noun="dish", error=TopologyError)
    assert spec is KNOWN[name]
    return name, options


def test_options_are_keyword_arguments_of_the_build() -> None:
    name, options = parse(" cake : layers = 3 , bake-time = 0.5 ")
    assert (name, options) == ("cake", {"layers": 3, "bake_time": 0.5})
    assert CAKE.build(**options) == (3, 0.5)
    assert parse("cake:layers=2,icing=red,shift=-4,heat=-0.5")[1] == {
        "layers": 2, "icing": "red", "shift": -4, "heat": -0.5,
    }  # fmt: skip
    assert parse("bread") == ("bread", {})


def test_a_path_is_everything_after_the_colon() -> None:
    assert parse("recipe:a=b,c:d.txt")[1] == {"file": Path("a=b,c:d.txt")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cak", "unknown dish 'cak'; known: bread, cake, recipe. Did you mean 'cake'?"),
        ("bread:layers=1", "unknown parameter of bread 'layers'; known: none."),
        ("cake:layrs=1", "known: bake-time, heat, icing, layers, shift. Did you mean 'layers'?"),
        ("cake:bake_time=1,layers=1", "unknown parameter of cake 'bake_time'"),
        ("cake", "cake needs layers; got ''. Write 'cake:layers=...'."),
        ("cake:layers=1,layers=1", "cake takes layers once; got 'layers=1,layers=1'."),
        ("cake:layers=0", "cake:layers must be a whole number >= 1; got '0'."),
        ("cake:layers=1.0", "cake:layers must be a whole number >= 1; got '1.0'."),
        ("cake:layers=1,bake-time=0", "bake-time must be a finite number > 0; got '0'."),
        ("cake:layers=1,bake-time=inf", "bake-time must be a finite number > 0; got 'inf'."),
        ("cake:layers=1,icing=green", "cake:icing must be one of red, blue; got 'green'."),
        ("cake:layers=1,shift=0.5", "cake:shift must be a whole number; got '0.5'."),
        ("cake:layers=1,heat", "cake:heat must be a number; got ''. Write it as key=value."),
    ],
)
def test_a_wrong_line_is_refused_with_the_way_out(text: str, message: str) -> None:
    with pytest.raises(TopologyError) as refused:
        parse(text)
    assert message in str(refused.value)


def test_the_error_is_the_one_that_is_asked_for() -> None:
    assert lookup({"a": 1}, "a", "letter", error=ConfigError) == 1
    with pytest.raises(ConfigError, match=r"unknown letter 'b'; known: a\.$"):
        lookup({"a": 1}, "b", "letter", error=ConfigError)
