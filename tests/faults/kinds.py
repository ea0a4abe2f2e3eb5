"""All kinds of trials, in the order of the table."""

from tests.faults import flips, fuzz, kills

KINDS = [*kills.KINDS, *flips.KINDS, *fuzz.KINDS]
