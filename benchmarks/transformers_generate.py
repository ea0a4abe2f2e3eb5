"""transformers' generate of a landmark model beside `landmark generate`: the same tokens, and how fast they come.

    python benchmarks/transformers_generate.py --output benchmarks/results/transformers_generate-MACHINE.md

The paper's model with random weights, in bfloat16, greedy. What a new token takes is the difference between generating
1 + --new-tokens and 1, so that reading the prompt and recording CUDA graphs for it are in neither; best of --repeats,
the two in turn. Exit code 1 where the tokens differ.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import transformers

from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.inference.generation import generate
from landmark_cli.inference.settings import SamplingSettings
from landmark_cli.models.generation_config import silence
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(work) -> tuple[float, list[list[int]]]:
    """Seconds that a call takes, and the tokens that it returns."""
    begin = time.perf_counter()
    tokens = work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = load_tokenizer("gpt2").as_transformers()
    config = GPTConfig(n_layer=options.layers, n_embd=options.width, eos_token_id=None)
    model = GPTForCausalLM(config).to(DEVICE, torch.bfloat16).eval()
    silence(model, tokenizer)
    # Neither may stop at an end of text.
    tokenizer.eos_token = None
    chip = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    lines = [
        f"# transformers' generate beside `landmark generate`: {chip}",
        "",
        f"torch {torch.__version__}, transformers {transformers.__version__}; {options.layers} layers of "
        f"{options.width}, bfloat16, {options.prompt_tokens} tokens read, {options.new_tokens} generated, greedy, best "
        f"of {options.repeats}.",
        "",
        "| batch | landmark generate, ms a step | transformers, ms a step | speed of transformers' | same tokens |",
        "|---|---|---|---|---|",
    ]
    same = True
    for batch in options.batches:
        ids = torch.randint(0, 50000, (batch, options.prompt_tokens), generator=torch.Generator().manual_seed(1))

        def ours(new: int, ids=ids) -> list[list[int]]:
            sampling = SamplingSettings(max_new_tokens=new, temperature=0)
            return [one.tokens for one in generate(model, tokenizer, list(ids), sampling)]

        def theirs(new: int, ids=ids) -> list[list[int]]:
            out = model.generate(ids.to(DEVICE), max_new_tokens=new, do_sample=False)
            return out[:, ids.shape[1] :].tolist()

        best, tokens = {}, {}
        for _ in range(options.repeats):
            for way in (ours, theirs):
                for new in (1, 1 + options.new_tokens):
                    seconds, tokens[way] = timed(lambda way=way, new=new: way(new))
                    best[way, new] = min(seconds, best.get((way, new), seconds))
        steps = {
            way: 1e3 * (best[way, 1 + options.new_tokens] - best[way, 1]) / options.new_tokens for way in (ours, theirs)
        }
        equal = tokens[ours] == tokens[theirs]
        same &= equal
        lines.append(
            f"| {batch} | {steps[ours]:.3f} | {steps[theirs]:.3f} | {steps[ours] / steps[theirs]:.3f} | "
            f"{'yes' if equal else 'NO'} |"
        )
        print("\n".join(lines[-1:]), flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        print("\n".join(lines))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
