"""Check of what an agent leaves neither masked nor trained."""

from collections.abc import Iterator, Mapping
from typing import Any

from flower_mcepl.doctor.findings import Examination, Finding
from flower_mcepl.record.frozen import frozen_line, is_much


def check_frozen(handshake: Mapping[str, Any]) -> Iterator[Finding]:
    """Finding on the frozen share of a network; none where it is about zero."""
    facts = {key.replace("-", "_"): fact for key, fact in handshake.items()}
    line = frozen_line([facts])
    if not line:
        return
    values = {key: facts[key] for key in ("frozen_share", "frozen_weights") if key in facts}
    with Examination("frozen-weights", remedy="") as check:
        if is_much(facts):
            remedy = (
                "Register their layers with flower_mcepl.masks.maskable, or use an algorithm that "
                "trains weights."
            )
            check.warn(line, remedy, **values)
        else:
            check.ok(line, **values)
    yield check.finding
