"""Averages made after the run, from what it kept: mathematics first, files second."""
