"""What each generated token read of the text before it, written to a file: as data, or as a page to look at."""

from .contents import GenerationTrace, trace_of
from .files import check_trace, write_trace

__all__ = ["GenerationTrace", "check_trace", "trace_of", "write_trace"]
