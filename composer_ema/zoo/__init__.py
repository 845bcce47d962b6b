"""Data sets, models and callbacks that a recipe can name."""
