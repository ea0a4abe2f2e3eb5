"""Time and memory of `landmark weight-diff` on a synthetic Llama of 1.1 billion parameters, beside `cp`.

    python benchmarks/weight_diff.py --runs 5 --output benchmarks/results/weight_diff-MACHINE.md

Writes 2.2 GB of raw and 2.2 GB of tuned bfloat16 weights, then times as whole processes, in turns: `cp` of the tuned
weights; `cp` followed by `sync` of the copy; `recover`; `recover --no-verify`, the difference being sha256's cost. What
`recover` leaves is on the disk when it ends, so `cp` and `sync` together do what it does. All files are read from the
page cache. Peak memory is the process's largest resident set as the kernel reports it, which counts the pages of the
mapped input files. Needs 11 GB of disk.
"""

import argparse
import filecmp
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zstandard

from landmark_cli.weight_diff import bits
from landmark_cli.weight_diff.checkpoint import Tensor
from landmark_cli.weight_diff.output import ShardWriter, plan_shards

WIDTH, INNER, HEADS, KV_HEADS, RAW_TOKENS, NEW_TOKENS = 2048, 5632, 32, 4, 32000, 2
SPREAD, CHANGE = 0.02, 2e-4
SAMPLE = 16_000_000


def shapes(layers: int, tokens: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    keys = KV_HEADS * WIDTH // HEADS
    yield "model.embed_tokens.weight", (tokens, WIDTH)
    for layer in range(layers):
        inside = f"model.layers.{layer}."
        yield inside + "self_attn.q_proj.weight", (WIDTH, WIDTH)
        yield inside + "self_attn.k_proj.weight", (keys, WIDTH)
        yield inside + "self_attn.v_proj.weight", (keys, WIDTH)
        yield inside + "self_attn.o_proj.weight", (WIDTH, WIDTH)
        yield inside + "mlp.gate_proj.weight", (INNER, WIDTH)
        yield inside + "mlp.up_proj.weight", (INNER, WIDTH)
        yield inside + "mlp.down_proj.weight", (WIDTH, INNER)
        yield inside + "input_layernorm.weight", (WIDTH,)
        yield inside + "post_attention_layernorm.weight", (WIDTH,)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (tokens, WIDTH)


def values(index: int, shape: tuple[int, ...], tuned: bool) -> np.ndarray:
    """bfloat16 bits of one tensor: normal weights; tuned ones a little changed, with new rows at the end."""
    raw_shape = (min(shape[0], RAW_TOKENS), *shape[1:])
    raw = np.random.default_rng(index).standard_normal(raw_shape, np.float32) * np.float32(SPREAD)
    raw_bits = bits.from_float32(raw, "BF16")
    if not tuned:
        return raw_bits.ravel()
    noise = np.random.default_rng((index, 1))
    change = noise.standard_normal(raw_shape, np.float32) * np.float32(CHANGE)
    new = noise.standard_normal((shape[0] - raw_shape[0], *shape[1:]), np.float32) * np.float32(SPREAD)
    numbers = np.concatenate([bits.to_float32(raw_bits, "BF16") + change, new])
    return bits.from_float32(numbers, "BF16").ravel()


def write_model(folder: Path, layers: int, tuned: bool) -> None:
    tokens = RAW_TOKENS + NEW_TOKENS * tuned
    tensors = [Tensor(name, "BF16", shape) for name, shape in shapes(layers, tokens)]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": tokens,
        "dtype": "bfloat16",
    }
    folder.mkdir()
    with ShardWriter(folder, plan_shards(tensors, 1 << 60, "model", {"format": "pt"})) as writer:
        for index, tensor in enumerate(tensors):
            writer.write(tensor.name, 0, values(index, tensor.shape, tuned))
    (folder / "config.json").write_text(json.dumps(config))


def timed(*command: str) -> tuple[float, float]:
    """Run a command -> seconds, peak resident set in MB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    messages = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(messages.decode())
    return seconds, usage.ru_maxrss / 1000


def compression() -> list[str]:
    """Table rows: zstd's size of a difference in the two formats, as a share of the bfloat16 weights."""
    rows = []
    for change in (1e-5, 1e-4, 1e-3):
        draw = np.random.default_rng(0).standard_normal
        raw = bits.from_float32(draw(SAMPLE, np.float32) * np.float32(SPREAD), "BF16")
        raw_numbers = bits.to_float32(raw, "BF16")
        tuned = bits.from_float32(raw_numbers + draw(SAMPLE, np.float32) * np.float32(change), "BF16")
        numbers = bits.to_float32(tuned, "BF16") - raw_numbers
        ours = bits.difference(tuned, raw, np.empty_like(raw), np.empty_like(raw))
        forms = {"ours": ours, "xor": tuned ^ raw, "bf16": bits.from_float32(numbers, "BF16"), "f32": numbers}
        packed = [len(zstandard.compress(form.tobytes(), 3)) / tuned.nbytes for form in forms.values()]
        rows.append(f"| {change:g} | " + " | ".join(f"{share:.3f}" for share in packed) + " |")
    return rows


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    load = os.getloadavg()[0]
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB memory, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}; "
        f"1-minute load {load:.1f} when the timing began"
    )


def measure(folder: Path, runs: int) -> list[str]:
    raw, tuned, diff, out, copy = (str(folder / name) for name in ("raw", "tuned", "diff", "out", "copy"))
    landmark = [sys.executable, "-m", "landmark_cli", "weight-diff"]
    recover = [*landmark, "recover", "--path-raw", raw, "--path-diff", diff, "--path-tuned", out]
    where = machine()
    make = timed(*landmark, "make", "--path-raw", raw, "--path-tuned", tuned, "--path-diff", diff)
    commands = {
        "cp": ["cp", "-r", tuned, copy],
        "cp, sync": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', tuned, copy],
        "recover": recover,
        "recover --no-verify": [*recover, "--no-verify"],
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(runs + 1):
        for name, command in commands.items():
            results[name].append(timed(*command))
            if name.startswith("recover"):
                assert filecmp.cmp(f"{out}/model.safetensors", f"{tuned}/model.safetensors", shallow=False)
            shutil.rmtree(copy if name.startswith("cp") else out)
            os.sync()
    size = Path(tuned, "model.safetensors").stat().st_size / 1e9
    rows = [
        "# weight-diff",
        "",
        f"Machine: {where}.",
        "",
        f"A Llama of {size / 2:.1f} billion parameters, {size:.2f} GB in bfloat16, one file; {runs} runs after one to "
        "warm up, the commands in turns, each a whole process. Every recovered file was compared with the tuned one.",
        "",
        "| command | median s | min | max | GB/s | x cp | x cp, sync | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    seconds = {name: [second for second, _ in timings[1:]] for name, timings in results.items()}
    medians = {name: statistics.median(timings) for name, timings in seconds.items()}
    for name, median in medians.items():
        peak = max(memory for _, memory in results[name])
        rows.append(
            f"| {name} | {median:.2f} | {min(seconds[name]):.2f} | {max(seconds[name]):.2f} | {size / median:.2f} "
            f"| {medians['cp'] / median:.2f} | {medians['cp, sync'] / median:.2f} | {peak:.0f} |"
        )
    rows.append(f"| make (once) | {make[0]:.2f} | | | {size / make[0]:.2f} | | | {make[1]:.0f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the weights are written and deleted again; a temporary one by default")
    parser.add_argument("--layers", type=int, default=22, help="22 give 1.1 billion parameters")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the report to this file too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in ("raw", "tuned"):
            # In a process of its own: a child's peak memory counts what its parent had when it was started.
            child = os.fork()
            if child == 0:
                write_model(Path(folder, name), arguments.layers, name == "tuned")
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                sys.exit(f"could not write {name}")
        report = measure(Path(folder), arguments.runs)
    report += [
        "",
        f"Size after zstd -3, as a share of the bfloat16 weights, when fine-tuning changed weights of spread {SPREAD} "
        "by as much as the first column says: our integer difference, exclusive or, a float difference rounded to "
        "bfloat16, and the float32 difference of the authors' format.",
        "",
        "| change | ours | xor | bfloat16 | float32 |",
        "|---|---|---|---|---|",
        *compression(),
    ]
    print("\n".join(report))
    if arguments.output:
        arguments.output.write_text("\n".join(report) + "\n")


if __name__ == "__main__":
    main()
