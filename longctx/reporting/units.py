"""Writes numbers as people read them: three digits and a unit, hours and minutes."""

from __future__ import annotations


def number(value: float | None, form: str) -> str:
    """Writes a number as ``form`` says; None stands for one that is not finite."""
    return "nan" if value is None else format(value, form)


def quantity(value: float) -> str:
    """Writes a number with three digits and a unit: 950, 18.2k, 3.41M."""
    unit, *larger = ("", "k", "M", "G", "T")
    while abs(value) >= 999.5 and larger:
        unit, *larger = larger
        value /= 1000
    digits = 0 if not unit or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    """Writes a time in hours, minutes and seconds; hours only where there are any."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
