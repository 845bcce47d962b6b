"""A Composer run: its events become updates of averages and loans to evaluation."""
