"""The console script `landmark` and `python -m landmark_cli`."""

from landmark_cli.cli import main

if __name__ == "__main__":
    main()
