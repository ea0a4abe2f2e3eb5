"""Clients of benchmarks/serving.py, in a process of their own: those of one interpreter wait for each other.

    python benchmarks/serving_clients.py --url http://127.0.0.1:8000/v1 --first 0 --clients 8 --times 2

Each is a thread with the real openai client that streams one answer after another. Says that it is ready, waits for a
line, asks, and prints, of every answer, the seconds to its first piece, seconds in all, and tokens; null for one that
failed.
"""

import argparse
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai

WORDS = "the of and to in that was his he it with is for as had you not be her on at by which have or from this him but"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first client, from which prompts follow")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--times", type=int, default=1, help="answers that each client asks for")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.clients)
    prompts = [
        [prompt(number * options.times + time, options.prompt_tokens) for time in range(options.times)]
        for number in numbers
    ]
    clients = [openai.OpenAI(base_url=options.url, api_key="key", max_retries=0, timeout=600) for _ in numbers]
    print("ready", flush=True)
    sys.stdin.readline()
    with ThreadPoolExecutor(options.clients) as pool:
        answers = pool.map(lambda client, mine: [ask(client, each, options) for each in mine], clients, prompts)
        print(json.dumps([answer for client in answers for answer in client]))


def prompt(number: int, tokens: int) -> str:
    """A text of about so many tokens that begins like no other."""
    return " ".join([str(number), *random.Random(number).choices(WORDS.split(), k=tokens - 2)])


def ask(client: openai.OpenAI, text: str, options: argparse.Namespace) -> tuple[float, float, int] | None:
    began, first, tokens = time.monotonic(), None, 0
    try:
        stream = client.completions.create(
            model="model",
            prompt=text,
            max_tokens=options.new_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for event in stream:
            first = first or time.monotonic() - began
            tokens = event.usage.completion_tokens if event.usage else tokens
    except openai.OpenAIError as error:
        print(error, file=sys.stderr)
        return None
    return first, time.monotonic() - began, tokens


if __name__ == "__main__":
    main()
