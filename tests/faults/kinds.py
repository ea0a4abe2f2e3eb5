"""All kinds of trials, in the order of the table."""

from tests.faults import kills

KINDS = [*kills.KINDS]
