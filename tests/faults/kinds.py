"""All kinds of trials, in the order of the table."""

from tests.faults import fuzz, kills

KINDS = [*kills.KINDS, *fuzz.KINDS]
