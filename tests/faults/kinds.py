"""All kinds of trials, in the order of the table."""

from tests.faults import disks, flips, fuzz, kills, pairs, signals

KINDS = [*kills.KINDS, *flips.KINDS, *fuzz.KINDS, *disks.KINDS, *signals.KINDS, *pairs.KINDS]
