"""All kinds of trials, in the order of the table."""

from tests.faults import bombs, disks, flips, fuzz, kills, pairs, signals, strangers

KINDS = [
    *kills.KINDS,
    *flips.KINDS,
    *fuzz.KINDS,
    *bombs.KINDS,
    *strangers.KINDS,
    *disks.KINDS,
    *signals.KINDS,
    *pairs.KINDS,
]
