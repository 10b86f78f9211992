"""Personal models as files: what is left of a run, ready to run anywhere."""

from flower_mcepl.personal.agents import personal_network, save_agent
from flower_mcepl.personal.compacting import Compact, compact, compact_or_whole
from flower_mcepl.personal.network import reference_to, reference_to_app
from flower_mcepl.personal.origins import Origin
from flower_mcepl.personal.predicting import predict
from flower_mcepl.personal.reading import PersonalFile, load_personal, read_personal
from flower_mcepl.personal.writing import personal_bytes, save_personal

__all__ = [
    "Compact",
    "Origin",
    "PersonalFile",
    "compact",
    "compact_or_whole",
    "load_personal",
    "personal_bytes",
    "personal_network",
    "predict",
    "read_personal",
    "reference_to",
    "reference_to_app",
    "save_agent",
    "save_personal",
]
