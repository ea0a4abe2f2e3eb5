"""Where the files that come with this package are: GPT-2's vocabulary and the novels of a first corpus."""

from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"
SAMPLE = "sample"
"""What the novels are called, wherever a user may name text."""
