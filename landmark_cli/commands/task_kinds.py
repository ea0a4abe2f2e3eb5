"""The kinds of tasks, as an option names them."""

from typing import Literal

TaskKind = Literal[
    "look_up",
    "together",
    "all_values",
    "counting",
    "first_or_last",
    "chain",
    "quotation",
    "inventory",
    "completion",
    "transcription",
    "whole_chain",
]
KINDS_HELP = "A kind of question that tasks ask (repeatable; all alike often, one that is named twice twice as often)."
