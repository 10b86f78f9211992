"""What could keep a device or a run from working, found before it starts."""

from flower_mcepl.doctor.examination import Order, examine
from flower_mcepl.doctor.findings import FAILED, OK, WARNING, Finding
from flower_mcepl.doctor.superlink import SuperLink

__all__ = ["FAILED", "OK", "WARNING", "Finding", "Order", "SuperLink", "examine"]
