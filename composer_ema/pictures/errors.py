"""The error of everything that draws."""

from __future__ import annotations


class PlotError(ValueError):
    """Something cannot be drawn: which file or argument, why, and what to pass instead."""
