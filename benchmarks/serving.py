"""A load test of `landmark serve` on this machine's loopback, beside one offline batch of the same prompts.

    python benchmarks/serving.py --output benchmarks/results/serving-MACHINE.md
    python benchmarks/serving.py --model runs/pg19-landmark --clients 64 --prompt-tokens 2048 --new-tokens 128

Each client is a thread with the real openai client that streams one answer after another, none of which may begin like
an earlier one (so no memory is reused). Every client asks the same number of times, so the test ends by itself. Without
--model, a model of the demo's shape with random weights: speed does not depend on what they say.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import torch
from transformers.utils import logging

import landmark_cli
from landmark_cli.data.tokenizers import GPT2_LANDMARK_ID, load_tokenizer
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM

WORDS = "the of and to in that was his he it with is for as had you not be her on at by which have or from this him but"


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


def prompt(number: int, tokens: int) -> str:
    """A text of about so many tokens that begins like no other."""
    words = WORDS.split()
    chosen = torch.randint(len(words), (tokens - 2,), generator=torch.Generator().manual_seed(number)).tolist()
    return f"{number} " + " ".join(words[index] for index in chosen)


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


def served(path, options) -> tuple[list[tuple[float, float, int]], float, int]:
    """For every answer seconds to its first piece, seconds in all and tokens; seconds of the whole test; errors."""
    command = [sys.executable, "-m", "landmark_cli", "serve", "--model", str(path), "--device", options.device]
    command += ["--rows", str(options.clients), "--port", "0", "--name", "model"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"LANDMARK_API_KEY": "key"})
    try:
        url = next(found[1] for line in server.stderr if (found := re.search(r"at (http://\S+)", line)))
        threading.Thread(target=server.stderr.read, daemon=True).start()
        ask(url, [99_999], options)
        began = time.monotonic()
        with ThreadPoolExecutor(options.clients) as pool:
            numbers = [range(client * options.times, (client + 1) * options.times) for client in range(options.clients)]
            each = list(pool.map(lambda mine: ask(url, mine, options), numbers))
        took = time.monotonic() - began
    finally:
        server.terminate()
        server.wait(timeout=60)
    answers = [answer for client in each for answer in client]
    return [answer for answer in answers if answer is not None], took, answers.count(None)


def ask(url: str, numbers, options) -> list[tuple[float, float, int] | None]:
    """One client's answers, one after another; None for one that failed."""
    client = openai.OpenAI(base_url=url, api_key="key", max_retries=0, timeout=600)
    answers = []
    for number in numbers:
        began, first = time.monotonic(), None
        settings = {"max_tokens": options.new_tokens, "temperature": 0, "stream": True}
        try:
            stream = client.completions.create(
                model="model",
                prompt=prompt(number, options.prompt_tokens),
                stream_options={"include_usage": True},
                **settings,
            )
            for event in stream:
                if first is None:
                    first = time.monotonic() - began
                if event.usage:
                    tokens = event.usage.completion_tokens
            answers.append((first, time.monotonic() - began, tokens))
        except openai.OpenAIError as error:
            print(error, file=sys.stderr)
            answers.append(None)
    return answers


def table(options, offline: float, answers: list[tuple[float, float, int]], took: float, errors: int) -> list[str]:
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
    ]


if __name__ == "__main__":
    main()
