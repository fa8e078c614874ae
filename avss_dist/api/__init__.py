"""Python functions of the commands, whose arguments are names and numbers.

Runs are named by id, model, glob, a part of an id, or a `Run`; thresholds by number or text (``"0.1rms"``).
"""
