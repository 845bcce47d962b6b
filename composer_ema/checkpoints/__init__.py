"""Averages in files: reading them without executing anything, older formats, export, inspection."""
