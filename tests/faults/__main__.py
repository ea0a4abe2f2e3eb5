"""`python -m tests.faults`: run the trials, print the table, and write it where docs/reliability.md is."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import kinds, workplace
from tests.faults.harness import run_kinds
from tests.faults.table import as_text, failures_of, write_page

# A trial flushes its files to the disk again and again; what these trials ask of the disk does not need a real one.
IN_MEMORY = Path("/dev/shm")
ROOM_IN_MEMORY = 2 << 30


def quick_folder() -> Path | None:
    """Where to work: in memory where there is room, else where temporary files go."""
    roomy = IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > ROOM_IN_MEMORY
    return IN_MEMORY if roomy and os.access(IN_MEMORY, os.W_OK) else None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few trials of each kind: about two minutes on 2 cores")
    parser.add_argument("--only", action="append", metavar="KIND", help="kinds whose name begins so (repeatable)")
    parser.add_argument("--count", type=int, help="so many trials of each kind")
    parser.add_argument("--trial", type=int, help="just the trial of this number")
    parser.add_argument("--seed", type=int, default=0, help="chooses moments and damages")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="trials at a time")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the table into this Markdown page")
    options = parser.parse_args()

    chosen = [k for k in kinds.KINDS if not options.only or any(k.name.startswith(name) for name in options.only)]
    if not chosen:
        parser.error(f"--only: there are {', '.join(kind.name for kind in kinds.KINDS)}")

    def counts(kind):
        if options.trial is not None:
            return [options.trial]
        return range(options.count or (kind.quick if options.quick else kind.full))

    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    workplace.import_everything()
    root = Path(tempfile.mkdtemp(prefix="landmark-faults-", dir=quick_folder()))
    try:
        workplace.make(root / "base")
        results = run_kinds(
            chosen,
            counts,
            seed=options.seed,
            base=root / "base",
            scratch=root / "trials",
            jobs=options.jobs,
            tell=lambda message: print(message, file=sys.stderr, flush=True),
        )
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(as_text(results))
    print(failures_of(results, options.seed))
    if options.write:
        write_page(options.write, results, seed=options.seed, seconds=time.monotonic() - started)
    # A run that was stopped has not shown what it was to show.
    whole = all(result.not_here or result.trials >= len(counts(result.kind)) for result in results)
    return 0 if whole and not any(result.failures for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
