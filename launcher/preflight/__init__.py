"""Looks at a whole run before it starts: what cannot be meant is refused, what is hardly meant is told, together."""

from longctx.launcher.preflight.facts import Device, Facts, Finding, device_here, device_of_job
from longctx.launcher.preflight.told import look, look_at_rate

__all__ = ["Device", "Facts", "Finding", "device_here", "device_of_job", "look", "look_at_rate"]
