"""Engines of a run without Flower: who calculates, and to which bits."""

from flower_mcepl.config.checks import check

LOOP = "loop"  # one agent after the other, to the bits of a run under Flower
BATCHED = "batched"  # equal agents as one stack, a class of arithmetic of its own
ENGINES = (LOOP, BATCHED)


def check_engine(engine: object) -> str:
    """Return the name of an engine.

    Raises
    ------
    ConfigError
        If there is none of that name.
    """
    check(engine in ENGINES, f"engine must be one of {', '.join(ENGINES)}", engine)
    return str(engine)
