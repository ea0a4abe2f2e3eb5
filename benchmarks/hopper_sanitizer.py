"""The Hopper kernels under compute-sanitizer, on small shapes: memory, races in shared memory, barriers.

    python benchmarks/hopper_sanitizer.py --output DIRECTORY

racecheck does not follow the handshake by which Triton's warp_specialize hands the warps their parts: the first warps
write what each warp is to run into shared memory, all meet at a barrier, the others read it. It reports the reading
and the writing as a race. A report counts as the handshake's if all its accesses lie on the line of a kernel's head or
behind the kernel's last access of its own, where nothing but warp_specialize is left; `--run control` is a kernel that
has a handshake and nothing else, for comparison. All other reports, and all that memcheck and synccheck find, are
errors: exit 0 means that there were none.
"""

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "landmark_cli" / "attention" / "kernels" / "hopper"
ACCESS = re.compile(r"(?:Read|Write) access at \w+\+0x[0-9a-f]+ in (\S+?):(\d+)")
RUNS = [("memcheck", "tiny"), ("synccheck", "tiny"), ("racecheck", "tiny"), ("racecheck", "control")]


@gluon.jit
def part(WHERE, number):
    gl.store(WHERE + number, number)


@gluon.jit
def control_kernel(WHERE, number):
    """Three groups of warps, as many and as large as in the Hopper kernels, that each store a number."""
    gl.warp_specialize(
        [(part, (WHERE, number)), (part, (WHERE, number + 1)), (part, (WHERE, number + 2))], [4, 1], [240, 24]
    )


def control() -> None:
    found = torch.zeros(4, dtype=torch.int32, device="cuda")
    for _ in range(4):
        control_kernel[(8,)](found, 1, num_warps=4, maxnreg=168)
    print("RESULT", found.tolist())


def handshake_lines() -> set[tuple[str, int]]:
    """(file, line) of every kernel's head, and of what follows its last access to shared memory, a fence."""
    lines = set()
    for path in [*KERNELS.glob("*.py"), Path(__file__)]:
        inside = False
        for number, line in enumerate(path.read_text().splitlines(), 1):
            head = re.match(r"def \w+_kernel\(", line) is not None
            if line and not line[0].isspace():
                inside = head and path == Path(__file__)
            if head or inside:
                lines.add((path.name, number))
            inside |= line == "    fence_async_shared()"
    return lines


def run(tool: str, group: str, limit: float) -> tuple[int, str]:
    """(exit status, output) of a group under a tool."""
    script = Path(__file__) if group == "control" else ROOT / "benchmarks" / "hopper_check.py"
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--print-limit", "200"]
    command += ["--error-exitcode", "9", sys.executable, str(script), "--run", group]
    # Without torch's pool of memory every tensor is an allocation, beyond whose end memcheck can see.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return 124, ""
    return done.returncode, done.stdout + done.stderr


def hazards(text: str, handshake: set[tuple[str, int]]) -> tuple[int, Counter]:
    """(reports that are the handshake's, the others by where they are)."""
    known, others = 0, Counter()
    for report in re.split(r"(?=Race reported)", text)[1:]:
        places = [(Path(file).name, int(line)) for file, line in ACCESS.findall(report)]
        if places and all(place in handshake for place in places):
            known += 1
        else:
            others[" ".join(f"{file}:{line}" for file, line in places) or report[:200]] += 1
    return known, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=["control"], help="the control kernel, in this process")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each tool")
    parser.add_argument("--output", type=Path, help="keep the tools' whole output here")
    options = parser.parse_args()
    if options.run:
        control()
        return
    # Compiled once, before all want it.
    first = [sys.executable, str(ROOT / "benchmarks" / "hopper_check.py"), "--run", "tiny"]
    subprocess.run(first, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, check=True)
    with ThreadPoolExecutor(len(RUNS)) as pool:
        results = list(pool.map(lambda pair: run(*pair, options.limit), RUNS))
    failed, handshake = False, handshake_lines()
    for (tool, group), (status, text) in zip(RUNS, results, strict=True):
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / f"{tool}-{group}.txt").write_text(text)
        known, others = hazards(text, handshake)
        ran = "RESULT" in text
        bad = not ran or (status != 0 and (tool != "racecheck" or bool(others) or not known))
        failed |= bad
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
        verdict = "FAILED" if bad else "clean"
        print(f"{tool} of {group}: {verdict} (exit {status}; {'; '.join(summary) or 'no summary'})")
        if tool == "racecheck":
            print(f"  reports of warp_specialize's own handshake: {known}; others: {dict(others) or 'none'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
