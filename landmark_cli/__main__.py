"""The console script `landmark` and `python -m landmark_cli`."""

import gc


def main() -> None:
    """Run the command line, and exit.

    What is imported at the start stays, and the garbage collector would look through all of it again and again: it
    rests until the work begins, where `cli.main` wakes it.
    """
    gc.disable()
    from landmark_cli import cli

    cli.main()


if __name__ == "__main__":
    main()
