"""Speed and peak memory of `landmark prepare pg19`, beside plain loops over the same files in the same run.

    python benchmarks/prepare.py --source NOVELS --runs 3 --output benchmarks/results/prepare-MACHINE.md

NOVELS has PG19's layout (train/, validation/ with a text file a book). In turns, each as a process of its own:

- `landmark prepare pg19` as a user runs it, from the start of the process to its end, into an empty directory;
- a plain loop: read a book, tiktoken's `encode_ordinary`, the end of text, append uint16 ids to a file;
- the same loop over two threads of tiktoken.

The ids of all three are compared. Time is wall time and the processor time of the process (which says more on a busy
machine); memory is the process's largest resident set as the kernel reports it. Files are read from the page cache.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from landmark_cli.data.token_file import TokenFile

LOOP = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from landmark_cli.data.tokenizers import load_tokenizer

encoding, threads = load_tokenizer("gpt2").encoding, int(sys.argv[3])

def ids(path):
    return encoding.encode_ordinary(path.read_bytes().decode())

for split in ("train", "validation"):
    paths = sorted(Path(sys.argv[1], split).glob("*.txt"))
    with open(Path(sys.argv[2], split + ".bin"), "wb") as file, ThreadPoolExecutor(threads) as pool:
        for document in map(ids, paths) if threads == 1 else pool.map(ids, paths):
            document.append(encoding.eot_token)
            np.array(document, dtype=np.uint16).tofile(file)
"""


def measure(command: list[str]) -> dict[str, float]:
    """Run a process: its wall and processor seconds and peak memory in MB."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:4])} ... ended with status {status}")
    wall = time.perf_counter() - started
    return {"wall": wall, "processor": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss / 1000}


def compare(folder: Path) -> str:
    """Whether all ways gave the same ids."""
    tokens = 0
    for split in ("train", "validation"):
        prepared = TokenFile.open(folder / "landmark prepare" / f"{split}.bin").tokens
        tokens += len(prepared)
        for other in sorted(folder.iterdir()):
            if not np.array_equal(prepared, np.fromfile(other / f"{split}.bin", dtype=np.uint16)):
                raise SystemExit(f"{other.name} gave other ids in {split}")
    return f"{tokens:,} ids, the same in every way"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="a folder in PG19's layout")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores", help="how to call this machine")
    parser.add_argument("--output", type=Path, help="write the result as Markdown")
    options = parser.parse_args()
    files = [file for split in ("train", "validation") for file in (options.source / split).glob("*.txt")]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = str(options.source)
        prepare = [sys.executable, "-m", "landmark_cli", "prepare", "pg19", "--source", source, "--output"]
        python = [sys.executable, "-c", LOOP, source]
        ways = {
            "landmark prepare": prepare,
            "plain loop": python,
            "loop, 2 threads": python,
        }
        seen = {name: [] for name in ways}
        for _ in range(options.runs):
            for name, command in ways.items():
                shutil.rmtree(folder / name, ignore_errors=True)
                (folder / name).mkdir()
                ending = {"plain loop": ["1"], "loop, 2 threads": ["2"]}.get(name, [])
                seen[name].append(measure([*command, str(folder / name), *ending]))
                print(name, json.dumps({key: round(value, 2) for key, value in seen[name][-1].items()}), flush=True)
        same = compare(folder)
    middle = {name: {k: statistics.median(run[k] for run in runs) for k in runs[0]} for name, runs in seen.items()}
    report = describe(middle, megabytes, len(files), options, same)
    print(report)
    if options.output:
        options.output.write_text(report)


def describe(middle: dict, megabytes: float, books: int, options: argparse.Namespace, same: str) -> str:
    plain = middle["plain loop"]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tiktoken", "gigatoken", "numpy"))
    lines = [
        "# landmark prepare",
        "",
        f"`python benchmarks/prepare.py --source NOVELS --runs {options.runs}` on {options.machine}, "
        f"Python {platform.python_version()}, {versions}.",
        f"{books} novels, {megabytes:.1f} MB of text; {same}.",
        f"Medians of {options.runs} whole processes, start-up included.",
        "",
        "| | wall s | MB/s | beside the plain loop | processor s | beside the plain loop | peak memory MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, run in middle.items():
        lines.append(
            f"| {name} | {run['wall']:.2f} | {megabytes / run['wall']:.1f} | {plain['wall'] / run['wall']:.1f}x "
            f"| {run['processor']:.2f} | {plain['processor'] / run['processor']:.1f}x | {run['memory']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
