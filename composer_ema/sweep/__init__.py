"""Which half-life was best: averages of a finished run, made of what it kept and evaluated by its own recipe."""
