"""From Python what the command line does: the functions whose work below takes objects, here by name and number.

Runs are named by id, model, glob, a part of an id, or a `Run`; thresholds by number or text (``"0.1rms"``).
"""
