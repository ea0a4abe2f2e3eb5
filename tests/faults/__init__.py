"""The proof of what is promised when something goes wrong: kills, damaged files, full disks, strangers' files, signals.

`python -m tests.faults` runs every kind of trial many times, from seeds, and prints what was promised, how often it was
tried and how often it did not hold. `pytest -m faults` runs a few of each kind.
"""
