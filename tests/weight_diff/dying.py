"""`landmark`, which dies by SIGKILL at its nth change of a file or directory below OUT: dying.py N OUT ARGUMENTS."""

import os
import signal
import sys

from landmark_cli.cli import main

left, below = int(sys.argv.pop(1)), sys.argv.pop(1)


def count(event, arguments):
    global left
    changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
    changes = changes or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT)
    if changes and str(arguments[0]).startswith(below):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.addaudithook(count)
    main()
