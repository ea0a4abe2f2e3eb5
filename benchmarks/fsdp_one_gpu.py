"""The FSDP config of recipes/llama under `accelerate launch`, with one process: trains, saves, resumes, opens anywhere.

    python benchmarks/fsdp_one_gpu.py --model data/smollm2 --output benchmarks/results/fsdp-MACHINE.md

Trains `--steps` steps with a checkpoint halfway; trains again from that checkpoint only; compares the losses and the
finished models; trains the same without FSDP; opens the finished model in a process that knows nothing of this package
(plain attention) and in one that imports it (landmark attention). accelerate has no FSDP on a CPU, so --cpu leaves the
launcher out and tries the rest of the script.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

CONFIG = Path(__file__).parents[1] / "recipes/llama/fsdp_8gpu.yaml"
OPEN_PLAINLY = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "landmark_cli" not in sys.modules
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
word = tokenizer.decode(model(ids).logits[0, -1].argmax())
print(type(model).__name__, model.config._attn_implementation, repr(word))
"""
OPEN_WITH_LANDMARKS = "import landmark_cli" + OPEN_PLAINLY.replace('assert "landmark_cli" not in sys.modules\n', "")


def launch(options: argparse.Namespace, output: Path, *more: object, fsdp: bool = True) -> None:
    """One run under `accelerate launch`, or by itself."""
    with_fsdp = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        CONFIG,
        "--num_processes=1",
        "--main_process_port=0",
        "-m",
        "landmark_cli",
    ]
    command = [sys.executable, *(with_fsdp if fsdp and not options.cpu else ["-m", "landmark_cli"]), "finetune"]
    command += [
        "--teacher",
        "none",
        "--model",
        options.model,
        "--data",
        options.data,
        "--output",
        output,
        "--steps",
        options.steps,
    ]
    command += ["--sequence-length", options.sequence_length, "--batch-size", 2, "--accumulation", 2]
    command += ["--lr", 1e-4, "--precision", "fp32" if options.cpu else "bf16", "--log-every", 1, "--eval-every", 0]
    command += ["--save-every", options.steps // 2, "--keep", 5, *(["--device", "cpu"] if options.cpu else []), *more]
    print("$", *map(str, command), flush=True)
    subprocess.run(list(map(str, command)), check=True)


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def opened(code: str, model: Path) -> str:
    """What a process prints that opens the model, or the end of its complaint."""
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True)
    return (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]


def difference(one: Path, other: Path) -> float:
    """The largest difference between two models' weights."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(path / "model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("data/smollm2"))
    parser.add_argument("--data", default="sample")
    parser.add_argument("--work", type=Path, default=Path("runs/fsdp"))
    parser.add_argument("--output", type=Path, help="write the report here too")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()

    shutil.rmtree(options.work, ignore_errors=True)
    whole, resumed, plain = (options.work / name for name in ("whole", "resumed", "plain"))
    launch(options, whole)
    half = f"checkpoints/step-{options.steps // 2:08d}"
    shutil.copytree(whole / half, resumed / half)
    shutil.copytree(whole / "data", resumed / "data")
    launch(options, resumed, "--resume")
    launch(options, plain, fsdp=False)

    chip = "CPU" if options.cpu else torch.cuda.get_device_name()
    rest = losses(whole)[options.steps // 2 :]
    lines = [
        f"# FSDP by {CONFIG.name} with one process",
        "",
        f"{chip}, torch {torch.__version__}; `python benchmarks/fsdp_one_gpu.py {' '.join(sys.argv[1:])}`",
        "",
        f"- losses of {options.steps} steps: {', '.join(f'{loss:.4f}' for loss in losses(whole))}",
        f"- resumed from step {options.steps // 2}: {', '.join(f'{loss:.4f}' for loss in losses(resumed))}; largest "
        f"difference {max(abs(a - b) for a, b in zip(rest, losses(resumed), strict=True)):.2g}, "
        f"of the final weights {difference(whole, resumed):.2g}",
        f"- without FSDP: {', '.join(f'{loss:.4f}' for loss in losses(plain))}; largest difference of the final "
        f"weights {difference(whole, plain):.2g}",
        f"- the checkpoint holds {', '.join(sorted(path.name for path in (whole / half).iterdir()))}",
        f"- opened without this package: {opened(OPEN_PLAINLY, whole)}",
        f"- opened with it: {opened(OPEN_WITH_LANDMARKS, whole)}",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
