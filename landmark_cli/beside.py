"""Another program, with our models known to the transformers that it uses:

    python -m landmark_cli.beside transformers serve

does what `transformers serve` does. transformers finds no models by entry points, so somebody has to import this
package, and a program of others does not.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import landmark_cli  # noqa: F401 (registers the models)
from landmark_cli.console import error


def main(words: list[str]) -> int | str | None:
    """Run an installed command: its name and its arguments. Returns what the command returns, for sys.exit.

    2 where nothing is named, or no such command is installed in this Python.
    """
    if not words or words[0].startswith("-"):
        error("name the program to run: python -m landmark_cli.beside PROGRAM [ARGUMENTS]")
        return 2
    found = entry_points(group="console_scripts", name=words[0])
    if not found:
        error(f"{words[0]}: no package of this Python ({sys.executable}) has a command of that name")
        return 2
    (command, *_) = found
    sys.argv = list(words)
    return command.load()()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
