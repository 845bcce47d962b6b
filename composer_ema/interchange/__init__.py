"""Averages in the files of other libraries, written as theirs and read back by them."""
