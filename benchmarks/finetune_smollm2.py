"""Fine-tune SmolLM2-135M with landmarks for some minutes on one machine, and read long texts with it.

    python -m tests.real.smollm2 data/smollm2
    python benchmarks/finetune_smollm2.py --model data/smollm2 --data NOVELS --minutes 5 --name finetune-smollm2-MACHINE

NOVELS holds text files in folders train/ and validation/, or token files made with the model's tokenizer. Everything is
done by the command line that a user has, in processes of their own:

1. a few steps to see how long one takes; as many as fit into the minutes are then the run's;
2. `landmark finetune`: speed and loss as its metrics.jsonl says (tokens include landmarks; MFU as the loop counts it);
3. `landmark eval perplexity` on held-out text: k retrieved blocks at every evaluation length, one chunk length for all;
   and the untouched model, which reads what its positions hold at a time, each by itself.

Writes benchmarks/results/NAME.md and NAME.json.
"""

import argparse
import importlib.metadata
import itertools
import json
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
CALIBRATION_STEPS = 12
CURVE_POINTS = 16


def landmark(*arguments: object) -> str:
    """Run the command line in a process of its own; returns what it prints."""
    command = [sys.executable, "-m", "landmark_cli", *map(str, arguments)]
    print("$ landmark", *arguments, flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def finetune(options: argparse.Namespace, output: Path, data: Path, steps: int, *more: object) -> list[dict]:
    """One run; returns the records of its metrics.jsonl."""
    shutil.rmtree(output, ignore_errors=True)
    arguments = ["--model", options.model, "--data", data, "--output", output, "--steps", steps]
    arguments += ["--sequence-length", options.sequence_length, "--landmark-freq", options.landmark_freq]
    arguments += ["--batch-size", options.batch_size, "--accumulation", options.accumulation, "--lr", options.lr]
    arguments += [
        "--eval-windows",
        options.eval_windows,
        "--warmup",
        "0.05",
        "--device",
        options.device,
        "--teacher",
        "none",
        *(["--compile"] if options.compile else []),
    ]
    landmark("finetune", *arguments, *more)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def perplexity(options: argparse.Namespace, model: Path, data: Path, length: int, *more: object) -> dict:
    """What `landmark eval perplexity` writes as JSON."""
    arguments = ["--model", model, "--data", data / "validation.bin", "--eval-length", length]
    arguments += ["--sample-tokens", max(options.sample_tokens, length), "--device", options.device]
    arguments += ["--dtype", "float32" if options.device == "cpu" else "bfloat16", "--json", "-"]
    return json.loads(landmark("eval", "perplexity", *arguments, *more))


def machine(device: str) -> str:
    """What it ran on."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "accelerate")
    )
    chip = platform.processor() or platform.machine()
    if device != "cpu" and torch.cuda.is_available():
        chip = torch.cuda.get_device_name()
    return f"{chip}; Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("data/smollm2"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/finetune-smollm2"), help="for runs and token files")
    parser.add_argument("--name", default="finetune-smollm2")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--sequence-length", type=int, default=1040, help="landmarks included")
    parser.add_argument("--landmark-freq", type=int, default=63)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--eval-windows", type=int, default=128, help="validation windows on the way")
    parser.add_argument("--eval-lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--top-k-blocks", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--sample-tokens", type=int, default=262144, help="validation tokens for each figure")
    parser.add_argument("--evaluations", type=int, default=1, help="so many at a time")
    options = parser.parse_args()

    data = options.data
    if not (data / "train.json").is_file():
        data = options.work / "data"
        landmark("prepare", "text", "--source", options.data, "--output", data, "--tokenizer", options.model)
    sparse = ["--eval-every", 0, "--save-every", 0]
    trial = finetune(options, options.work / "trial", data, CALIBRATION_STEPS, "--log-every", 4, *sparse)
    steps = max(int(options.minutes * 60 / trial[-1]["seconds_per_step"]), CALIBRATION_STEPS)
    output, every = options.work / "run", max(steps // CURVE_POINTS, 1)
    records = finetune(
        options, output, data, steps, "--log-every", every, "--eval-every", max(steps // 4, 1), "--save-every", 0
    )

    # The most blocks leave the least room for a chunk; all read in chunks of that length.
    block = options.landmark_freq + 1
    chunk = max((options.sequence_length - (max(options.top_k_blocks) + 1) * block) // block, 1) * options.landmark_freq

    def figure(length: int, k: int | None) -> dict:
        retrieval = [] if k is None else ["--top-k-blocks", k, "--chunk", chunk]
        result = perplexity(options, options.model if k is None else output, data, length, *retrieval)
        return result | {"model": "untouched" if k is None else "fine-tuned", "eval_length": length, "top_k_blocks": k}

    # Several at once: nothing is timed here, and one reader does not fill a GPU.
    with ThreadPoolExecutor(options.evaluations) as pool:
        pairs = itertools.product(options.eval_lengths, [*options.top_k_blocks, None])
        figures = list(pool.map(lambda pair: figure(*pair), pairs))
    report(options, records, figures, steps, chunk)


def report(options: argparse.Namespace, records: list[dict], figures: list[dict], steps: int, chunk: int) -> None:
    """Write the Markdown and JSON files and print the first."""
    training = [record for record in records if "loss" in record]
    last = training[-1]
    settled = sorted(record["tokens_per_second"] for record in training[1:])
    speed = settled[len(settled) // 2]
    utilisation = sorted(record["mfu"] for record in training[1:] if "mfu" in record)
    windows = options.batch_size * options.accumulation
    settings = vars(options) | {"model": str(options.model), "data": str(options.data), "work": str(options.work)}
    lines = [
        "# SmolLM2-135M with landmarks, fine-tuned on novels",
        "",
        f"Machine: {machine(options.device)}.",
        f"{steps} steps of {windows} windows of {options.sequence_length} tokens, landmarks included "
        f"(one after every {options.landmark_freq}), {last['tokens'] / 1e6:.1f}M tokens in all; "
        f"`python benchmarks/finetune_smollm2.py {' '.join(sys.argv[1:])}`.",
        "",
        f"Median speed {speed:,.0f} tokens/s"
        + (f", MFU {utilisation[len(utilisation) // 2]:.1%}" if utilisation else "")
        + f"; peak memory {last['peak_memory'] / 1e9:.1f} GB.",
        "",
        "| step | loss | validation loss | tokens/s |",
        "| --- | --- | --- | --- |",
    ]
    validation = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    for step in sorted({record["step"] for record in records}):
        loss = next((record for record in training if record["step"] == step), {})
        cells = [f"{loss['loss']:.4f}" if loss else "", f"{validation[step]:.4f}" if step in validation else ""]
        lines.append(f"| {step} | {' | '.join(cells)} | {loss.get('tokens_per_second', 0):,.0f} |")
    lines += [
        "",
        f"Perplexity on held-out text, read in chunks of {chunk} text tokens; k blocks of {options.landmark_freq} "
        "retrieved for each token and head. The untouched model reads what its positions hold at a time.",
        "",
        "| model | text length | k | perplexity | tokens |",
        "| --- | --- | --- | --- | --- |",
    ]
    for figure in figures:
        k = "" if figure["top_k_blocks"] is None else figure["top_k_blocks"]
        cells = [figure["model"], figure["eval_length"], k, f"{figure['perplexity']:.3f}", figure["tokens"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    RESULTS.mkdir(exist_ok=True)
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{options.name}.md").write_text(text, encoding="utf-8")
    content = {"machine": machine(options.device), "settings": settings, "training": records, "perplexity": figures}
    (RESULTS / f"{options.name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
