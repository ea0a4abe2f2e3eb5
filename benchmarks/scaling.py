"""How training scales over the GPUs of this machine, and whether it stays the same run.

    python benchmarks/scaling.py --output benchmarks/results/scaling-MACHINE.md
    python benchmarks/scaling.py --counts 1 --only fine-tuning --output benchmarks/results/scaling-one-gpu.md
    python benchmarks/scaling.py --cpu --counts 1,2      # tiny shapes on CPU processes: tries the script

Every measurement is a run of its own under `accelerate launch`, on 1, 2, 4, ... GPUs one after another:

- pre-training: `landmark train --recipe pg19/landmark` (DDP), with the recipe's global batch of 128 windows split over
  the GPUs, and again with 128 windows on each;
- fine-tuning: the recipe llama/finetune_7b by recipes/llama/fsdp_8gpu.yaml on the shape of Llama 3 8B with random
  weights (benchmarks/llama_shape.py): FSDP full shard, bf16, gradient checkpointing; in the recipe's micro-batches of 2
  windows, and in larger ones that make the same step. Where all 32 layers do not fit one GPU, 12 of them are measured
  too, which fit 80 GB;
- resuming (small shapes, fp32): what all GPUs saved goes on on one, and the reverse, beside one uninterrupted run.

Tokens/s are the loop's own, from metrics.jsonl: the median of the records after the warm-up. The text is random tokens.
NCCL's settings are left as they are. A run that fails is a line of the report, which is written anew after every run.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.llama_shape import parameter_count
from landmark_cli.console import quantity

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("pre-training", "fine-tuning", "resuming")
TARGETS = {"pre-training": (8, 0.92), "fine-tuning": (8, 0.85)}
WINDOWS = {"pre-training": 128, "fine-tuning": 16}
CPU_WINDOWS = {"pre-training": 8, "fine-tuning": 4}
FEWER_LAYERS = 12
TOKENS = 6_000_000
# Beside weights, gradients and optimizer: activations, logits, whole layers in bf16, what the allocator cannot use.
SPARE_BYTES = 10e9
SMALL_GPT = ["--n-layer", 2, "--n-head", 2, "--n-embd", 64, "--sequence-length", 128]
HEADER = (
    "| GPUs | windows a GPU | tokens a step | s a step | tokens/s | of each GPU | MFU | memory of each | efficiency |"
)


class Bench:
    """The runs of one call, and what they showed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        self.windows = CPU_WINDOWS if options.cpu else WINDOWS
        self.sections: dict[str, list[str]] = {}
        self.finished: set[Path] = set()
        self.fits_in = 0 if options.cpu else torch.cuda.get_device_properties(0).total_memory
        self.environment = os.environ | {"PYTHONPATH": str(ROOT)}
        if options.cpu:
            self.environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def note(self, section: str, line: str) -> None:
        """Add a line to a section and write the report so far."""
        print(line, flush=True)
        self.sections.setdefault(section, []).append(line)
        if self.options.output:
            self.options.output.write_text(self.report(), encoding="utf-8")

    def report(self) -> str:
        options = self.options
        chip = "CPU processes, tiny shapes" if options.cpu else torch.cuda.get_device_name()
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "accelerate"))
        nvls = os.environ.get("NCCL_NVLS_ENABLE", "not set")
        found = 0 if options.cpu else torch.cuda.device_count()
        lines = [
            "# Scaling over GPUs",
            "",
            f"{chip}; {found} GPUs there; {versions}; NCCL_NVLS_ENABLE {nvls}; "
            f"`python benchmarks/scaling.py {' '.join(sys.argv[1:])}`",
        ]
        for title, content in self.sections.items():
            lines += ["", f"## {title}", "", *content]
        return "\n".join(lines) + "\n"

    def launch(self, name: str, processes: int, launcher: list[object], command: list[object]) -> Path:
        """Run to the end in a directory of that name, which is returned; not again what has run under this name.
        RuntimeError with what it complained of."""
        output = self.work / name
        if output in self.finished:
            return output
        whole = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--num_processes", processes]
        whole = [str(part) for part in [*whole, *command]]
        print(f"$ {' '.join(whole[3:])}", flush=True)
        log = self.work / f"{name}.log"
        started = time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen(whole, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT)
            try:
                status = process.wait(timeout=self.options.limit)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
                status = f"no end after {self.options.limit} s"
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
        if status:
            text = log.read_text()
            print("\n".join(text.splitlines()[-40:]), flush=True)
            said = re.findall(r"^(?:\[rank\d+\]: )?(\w*[Ee]rror: .+)", text, re.MULTILINE)
            raise RuntimeError(f"{status}: {said[0][:160] if said else f'see {log}'}")
        self.finished.add(output)
        return output

    def pretrain(self, name: str, processes: int, batch: int, accumulation: int, *more: object) -> Path:
        multi = ["--multi_gpu"] if processes > 1 else []
        launcher = ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", *multi]
        command = ["-m", "landmark_cli", "train", "--recipe", "pg19/landmark", "--data", self.work / "corpus"]
        command += ["--output", self.work / name, "--batch-size", batch, "--accumulation", accumulation]
        command += ["--eval-every", 0, "--save-every", 0, *(["--device", "cpu"] if self.options.cpu else [])]
        return self.launch(name, processes, launcher, [*command, *more])

    def finetune(self, name: str, processes: int, batch: int, accumulation: int, layers: int, **more: object) -> Path:
        launcher = ["--config_file", ROOT / "recipes/llama/fsdp_8gpu.yaml"]
        values = {"data": self.work / "corpus", "output": self.work / name, "save_every": 0}
        values |= {"batch_size": batch, "accumulation": accumulation}
        values |= ({"device": "cpu", "precision": "fp32"} if self.options.cpu else {}) | more
        tiny = ["--tiny"] if self.options.cpu or "resume" in name else []
        command = [ROOT / "benchmarks/llama_shape.py", *tiny, "--layers", layers]
        return self.launch(name, processes, launcher, [*command, *(f"{key}={value}" for key, value in values.items())])


def records(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if "tokens_per_second" in record]


def row(run: Path, processes: int, split: str, warm: int, base: tuple[int, float] | None) -> tuple[str, float]:
    """A run's line in its table, and its tokens/s. base: GPUs and tokens/s of the run that it is compared with."""
    kept = [record for record in records(run) if record["step"] > warm]
    speed = statistics.median(record["tokens_per_second"] for record in kept)
    seconds = statistics.median(record["seconds_per_step"] for record in kept)
    used = statistics.median(record.get("mfu", 0.0) for record in kept)
    last = kept[-1]
    against = base or (processes, speed)
    efficiency = speed / processes / (against[1] / against[0])
    cells = [
        processes,
        split,
        f"{last['tokens'] // last['step']:,}",
        f"{seconds:.3f}",
        f"{speed:,.0f}",
        f"{speed / processes:,.0f}",
        f"{used:.1%}" if used else "-",
        quantity(last["peak_memory"], "B"),
        f"{efficiency:.1%}" + (f" of {against[0]}" if against[0] > 1 else ""),
    ]
    return f"| {' | '.join(map(str, cells))} |", speed


def curve_difference(run: Path, other: Path) -> float:
    """The largest relative difference of two runs' losses over the steps that both recorded."""
    ours, theirs = ({record["step"]: record["loss"] for record in records(which)} for which in (run, other))
    shared = ours.keys() & theirs.keys()
    return max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in shared)


def measure(bench: Bench, part: str, title: str, per_gpu: bool, batch: int, run: Any) -> None:
    """One table: `run(name, GPUs, batch, accumulation)` for every count, in steps of the part's windows, split over
    the GPUs or (per_gpu) as many on each."""
    options, base, first = bench.options, None, None
    warm = (options.steps if part == "pre-training" else options.steps // 2) // 3
    bench.note(title, HEADER)
    bench.note(title, "|---:" * HEADER.count(" | ") + "|---:|")
    reached, curves = {}, []
    for count in options.counts:
        windows = bench.windows[part] if per_gpu else bench.windows[part] // count
        size = min(batch, windows)
        name = f"{title.split(':')[0]}-{size}x{windows // size}-on-{count}".replace(", ", "-").replace(" ", "-").lower()
        try:
            done = run(name, count, size, windows // size)
            line, speed = row(done, count, f"{windows} = {size} x {windows // size}", warm, base)
        except (RuntimeError, OSError, ValueError) as error:
            bench.note(
                title, f"| {count} | {windows} = {size} x {windows // size} | failed: {error} " + "|  " * 6 + "|"
            )
            continue
        base, first = base or (count, speed), first or done
        reached[count] = speed / count / (base[1] / base[0])
        bench.note(title, line)
        if not per_gpu and done != first:
            curves.append(f"on {count}: {curve_difference(done, first):.1e}")
    count, target = TARGETS[part]
    measured = count in reached and base[0] == 1
    verdict = "not measured" if not measured else "reached" if reached[count] >= target else "missed"
    bench.note(title, f"\nTarget: {target:.0%} on {count} GPUs beside one: {verdict}.")
    if curves:
        bench.note(title, f"Largest relative difference of the losses from {base[0]} GPU's: {', '.join(curves)}.")


def pretraining(bench: Bench) -> None:
    options = bench.options
    # Steps are recorded in fives, so that reading the loss does not hold the GPU up.
    settings = ["--steps", options.steps, "--log-every", 1 if options.cpu else 5]
    settings += [*SMALL_GPT, "--precision", "fp32"] if options.cpu else []
    settings += ["--compile"] if options.compile else []

    def run(name: str, count: int, batch: int, accumulation: int) -> Path:
        return bench.pretrain(name, count, batch, accumulation, *settings)

    for per_gpu in (False, True):
        where = "on every GPU" if per_gpu else "over all GPUs"
        title = f"Pre-training, DDP: {bench.windows['pre-training']} windows {where}"
        measure(bench, "pre-training", title, per_gpu, 1 if options.cpu else 16, run)


def finetuning(bench: Bench) -> None:
    options = bench.options
    depths = [2] if options.cpu else [32] if fits(bench, 32, 1, 8) else [FEWER_LAYERS, 32]
    for layers in options.layers or depths:

        def run(name: str, count: int, batch: int, accumulation: int, layers: int = layers) -> Path:
            if not fits(bench, layers, count, accumulation):
                raise RuntimeError("does not fit")
            short = {"sequence_length": 128, "landmark_freq": 63} if options.cpu else {}
            return bench.finetune(name, count, batch, accumulation, layers, steps=options.steps // 2, **short)

        for batch in options.micro_batches:
            title = f"Fine-tuning {layers} layers, FSDP: micro-batches of {batch} windows"
            measure(bench, "fine-tuning", title, True, batch, run)


def fits(bench: Bench, layers: int, count: int, accumulation: int) -> bool:
    """Whether the shape's training fits the GPUs: 16 bytes a weight over all, and 4 on each for the sum of gradients of
    several micro-batches, which is not sharded before the last."""
    if bench.options.cpu:
        return True
    sums = 4 if accumulation > 1 and count > 1 else 0
    return parameter_count(layers) * (16 / count + sums) + SPARE_BYTES < bench.fits_in


def resuming(bench: Bench) -> None:
    """Small runs in float32, halfway saved on one number of GPUs, and from there on another."""
    count = max(bench.options.counts)
    title = f"Resuming on another number of GPUs: {count} and 1"
    bench.note(title, "| what | saved on | went on on | largest relative difference of the losses |")
    bench.note(title, "|---|---:|---:|---:|")
    steps, half = 8, 4
    common = {"steps": steps, "log_every": 1, "save_every": half, "precision": "fp32"}

    def gpt(name: str, processes: int, resume: bool) -> Path:
        settings = [part for key, value in common.items() for part in (f"--{key.replace('_', '-')}", value)]
        return bench.pretrain(
            name, processes, 2, 8 // processes, *SMALL_GPT, "--no-tf32", *settings, *["--resume"][:resume]
        )

    def llama(name: str, processes: int, resume: bool) -> Path:
        short = {"sequence_length": 128, "landmark_freq": 63, "tf32": "false", "resume": str(resume).lower()}
        return bench.finetune(name, processes, 1, 8 // processes, 2, **common, **short)

    for what, run in (("pre-training, DDP", gpt), ("fine-tuning, FSDP", llama)):
        base = f"resume-{run.__name__}"
        try:
            runs = {processes: run(f"{base}-{processes}", processes, False) for processes in {1, count}}
            bench.note(title, f"| {what} | {count} | - | {curve_difference(runs[count], runs[1]):.1e} |")
            for saved, after in ((count, 1), (1, count)):
                name = f"{base}-{saved}-to-{after}"
                cut = f"checkpoints/step-{half:08d}"
                shutil.copytree(runs[saved] / cut, bench.work / name / cut)
                resumed = run(name, after, True)
                bench.note(title, f"| {what} | {saved} | {after} | {curve_difference(resumed, runs[1]):.1e} |")
        except (RuntimeError, OSError, ValueError) as error:
            bench.note(title, f"| {what} | failed: {error} | | |")


def write_corpus(directory: Path, tokens: int) -> None:
    """Token files of random tokens."""
    from landmark_cli.data.token_file_writer import TokenFileWriter
    from landmark_cli.data.tokenizers import load_tokenizer

    tokenizer, drawn = load_tokenizer("gpt2"), np.random.default_rng(0)
    with TokenFileWriter(directory / "train.bin", tokenizer, source="random numbers") as writer:
        for _ in range(tokens // 100_000):
            writer.add_document(drawn.integers(0, tokenizer.eot_id, 100_000).astype(np.uint16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--counts", type=numbers, help="numbers of GPUs [default: 1, 2, 4, ... of this machine]")
    parser.add_argument("--only", choices=PARTS, action="append", help="repeatable")
    parser.add_argument("--layers", type=numbers, help="of the 8B shape [default: 32, with 12 where 32 do not fit one]")
    parser.add_argument("--micro-batches", type=numbers, default=[2, 8], help="windows at a time in fine-tuning")
    parser.add_argument("--steps", type=int, default=30, help="of pre-training; fine-tuning takes half of them")
    parser.add_argument("--compile", action="store_true", help="pre-train with torch.compile")
    parser.add_argument("--limit", type=int, default=280, help="seconds that a run may take")
    parser.add_argument("--work", type=Path, default=Path("runs/scaling"), help="emptied first")
    parser.add_argument("--output", type=Path, help="write the report here too")
    parser.add_argument("--cpu", action="store_true", help="CPU processes and tiny shapes")
    options = parser.parse_args()
    options.work = options.work.resolve()
    found = os.cpu_count() if options.cpu else torch.cuda.device_count()
    options.counts = options.counts or [2**power for power in range(found.bit_length())]

    shutil.rmtree(options.work, ignore_errors=True)
    write_corpus(options.work / "corpus", TOKENS // 20 if options.cpu else TOKENS)
    bench = Bench(options)
    for part, do in zip(PARTS, (pretraining, finetuning, resuming), strict=True):
        if part in (options.only or PARTS) and (part != "resuming" or max(options.counts) > 1):
            do(bench)
    print("\n" + bench.report())


if __name__ == "__main__":
    main()
