"""A load test of `landmark serve` on this machine's loopback, beside one offline batch of the same prompts.

    python benchmarks/serving.py --output benchmarks/results/serving-MACHINE.md
    python benchmarks/serving.py --model runs/pg19-landmark --clients 64 --prompt-tokens 2048 --new-tokens 128

Each client (benchmarks/serving_clients.py) is a thread with the real openai client that streams one answer after
another, none of which may begin like an earlier one (so no memory is reused). Every client asks the same number of
times, so the test ends by itself; all begin together. Without --model, a model of the demo's shape with random weights:
speed does not depend on what they say.

Of where the time went the table says: of the server's engine the seconds of each part of its work, those in which it
waited for the device included, and the processor's of the thread that talks to clients, which shares an interpreter
with it.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import torch
from serving_clients import prompt
from transformers.utils import logging

import landmark_cli
from landmark_cli.data.gpt2_tokenizer import GPT2_LANDMARK_ID
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM

CLIENTS = "the clients' thread, processor time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory; without one, the demo's shape with random weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--times", type=int, default=3, help="answers that each client asks for")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or demo_shape(Path(folder) / "demo")
        model, tokenizer = landmark_cli.load(path, device=None if options.device == "auto" else options.device)
        offline = offline_rate(model, tokenizer, options)
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        lines = table(options, offline, *served(path, options))
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


def demo_shape(directory: Path) -> Path:
    """A model of the demo's shape (recipes/demo/tiny.yaml) with random weights."""
    tokenizer = load_tokenizer("gpt2")
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "landmark_freq": 15, "trained_length": 256, "top_k_blocks": 4}
    config = GPTConfig(vocab_size=50304, landmark_token_id=GPT2_LANDMARK_ID, eos_token_id=tokenizer.eot_id, **shape)
    GPTForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def offline_rate(model, tokenizer, options) -> float:
    """New tokens a second of one batch, reading included."""
    prompts = [prompt(10_000 + number, options.prompt_tokens) for number in range(options.clients)]
    sampling = landmark_cli.SamplingSettings(max_new_tokens=options.new_tokens, temperature=0)
    rates = []
    for _ in range(4):
        began = time.monotonic()
        found = landmark_cli.generate(model, tokenizer, prompts, sampling)
        rates.append(sum(len(each.tokens) for each in found) / (time.monotonic() - began))
    return max(rates)


def served(path, options) -> tuple[list[tuple[float, float, int]], float, int, dict[str, float]]:
    """For every answer seconds to its first piece, seconds in all and tokens; seconds of the whole test; errors; and
    where the server's time went."""
    command = [sys.executable, "-m", "landmark_cli", "serve", "--model", str(path), "--device", options.device]
    command += ["--rows", str(options.clients), "--port", "0", "--name", "model"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"LANDMARK_API_KEY": "key"})
    try:
        url = next(found[1] for line in server.stderr if (found := re.search(r"at (http://\S+)", line)))
        threading.Thread(target=server.stderr.read, daemon=True).start()
        for number in range(2):
            ask_all([clients(url, 10**6 + number, 1, 1, options)])
        share = -(-options.clients // max(1, min(options.clients, os.cpu_count() // 2)))
        firsts = range(0, options.clients, share)
        started = [clients(url, first, min(share, options.clients - first), options.times, options) for first in firsts]
        before, began = spent(url), time.monotonic()
        answers = ask_all(started)
        took, after = time.monotonic() - began, spent(url)
    finally:
        server.terminate()
        server.wait(timeout=60)
    parts = {part: after[part] - before.get(part, 0.0) for part in after if part != "waiting"}
    # What is counted of this began before the test, and the rest is that.
    parts["nothing to do"] = took - sum(seconds for part, seconds in parts.items() if part != CLIENTS)
    return [answer for answer in answers if answer is not None], took, answers.count(None), parts


def clients(url: str, first: int, count: int, times: int, options) -> subprocess.Popen:
    """A process with `count` clients, who are ready to ask."""
    sizes = "--prompt-tokens", str(options.prompt_tokens), "--new-tokens", str(options.new_tokens)
    who = "--first", str(first), "--clients", str(count), "--times", str(times)
    script = str(Path(__file__).with_name("serving_clients.py"))
    pipe = subprocess.PIPE
    started = subprocess.Popen([sys.executable, script, "--url", url, *who, *sizes], stdin=pipe, stdout=pipe, text=True)
    started.stdout.readline()
    return started


def ask_all(started: list[subprocess.Popen]) -> list[tuple[float, float, int] | None]:
    """Have all of these clients ask at once; their answers."""
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    return [answer for process in started for answer in json.loads(process.communicate()[0])]


def spent(url: str) -> dict[str, float]:
    """Seconds by what they were spent on, as the server counts them."""
    asked = urllib.request.Request(url.removesuffix("v1") + "metrics", headers={"Authorization": "Bearer key"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        text = answer.read().decode()
    found = re.findall(r'^landmark_engine_seconds_total\{part="(.+)"\} (\S+)$', text, re.MULTILINE)
    found += [(CLIENTS, value) for value in re.findall(r"^landmark_http_cpu_seconds (\S+)$", text, re.MULTILINE)]
    return {part: float(value) for part, value in found}


def table(
    options, offline: float, answers: list[tuple[float, float, int]], took: float, errors: int, parts: dict[str, float]
) -> list[str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and options.device != "cpu" else "CPU"
    firsts = sorted(first for first, _, _ in answers)
    rate = sum(tokens for _, _, tokens in answers) / took
    return [
        "# Serving",
        "",
        f"{device}, {os.cpu_count()} processors, torch {torch.__version__}; "
        f"{options.model or 'a model of the shape of recipe demo/tiny'}; {options.clients} clients on the same "
        f"machine, {options.times} answers each, prompts of about {options.prompt_tokens} tokens, "
        f"{options.new_tokens} new ones",
        "",
        "| what | figure |",
        "|---|---:|",
        f"| answers, errors | {len(answers)}, {errors} |",
        f"| new tokens/s, served | {rate:.0f} |",
        f"| new tokens/s, one offline batch of {options.clients} | {offline:.0f} |",
        f"| served / offline | {rate / offline:.2f} |",
        f"| time to first token, median | {statistics.median(firsts):.2f} s |",
        f"| time to first token, 95th percentile | {firsts[int(0.95 * (len(firsts) - 1))]:.2f} s |",
        f"| the whole test | {took:.2f} s |",
        *(f"| the engine: {part} | {seconds:.2f} s |" for part, seconds in parts.items() if part != CLIENTS),
        f"| {CLIENTS} | {parts[CLIENTS]:.2f} s |",
    ]


if __name__ == "__main__":
    main()
