"""Reading on a CPU: landmark attention beside full attention, in turn in one process.

    python benchmarks/cpu_reading.py --output benchmarks/results/cpu-reading-MACHINE.md
    python benchmarks/cpu_reading.py --shapes smollm2 --prompts 513 --dtypes float32 --definition 513

A prompt is read for the logits after its last token, then tokens are decoded one by one. Beside it the same weights
with transformers' own attention (sdpa) and cache; of the demo's model, which has no cache of that kind, one forward
pass. The models have random weights: speed does not depend on what they say. --definition also reads prompts up to so
many tokens by the definition.

Where other work shares the processors, threads wait for each other most of the time: then OMP_NUM_THREADS=1 and
--processor-time, which counts the seconds that the process was computing.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.models import register
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM

SMOLLM2 = {
    "vocab_size": 49216,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
DEMO = {"vocab_size": 50304, "n_layer": 2, "n_head": 2, "n_embd": 64, "trained_length": 256}
PROMPTS = {"smollm2": [513, 4096, 8192], "demo": [1000, 20000]}
STEPS = 8
Clock = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--prompts", nargs="+", type=int, help="tokens, in place of each shape's own lengths")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--definition", type=int, default=0, help="longest prompt that the definition reads too")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    register()
    rows = []
    for shape in options.shapes:
        for dtype in options.dtypes:
            models = pair(shape, getattr(torch, dtype))
            for prompt in options.prompts or PROMPTS[shape]:
                rows.append([shape, dtype, f"{prompt:,}", *measure(models, prompt, options)])
                print(rows[-1], flush=True)
    text = report(rows, options)
    print(text)
    if options.output:
        options.output.write_text(text)


def pair(shape: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(with full attention, with landmark attention), of the same weights."""
    torch.manual_seed(0)
    if shape == "demo":
        landmarks = {"landmark_freq": 15, "landmark_token_id": 50260, "top_k_blocks": 4}
        full = GPTForCausalLM(GPTConfig(**DEMO, landmark_freq=None, landmark_token_id=None))
        ours = GPTForCausalLM(GPTConfig(**DEMO, **landmarks))
    else:
        landmarks = {"landmark_freq": 63, "landmark_token_id": 49152, "trained_length": 2048, "top_k_blocks": 4}
        full = LlamaForCausalLM(LlamaConfig(**SMOLLM2, attn_implementation="sdpa"))
        ours = LlamaForCausalLM(LlamaConfig(**SMOLLM2, **landmarks, attn_implementation="landmark"))
    full, ours = full.to(dtype).eval(), ours.to(dtype).eval()
    ours.load_state_dict(full.state_dict(), assign=True)
    return full, ours


def measure(models: tuple[PreTrainedModel, PreTrainedModel], prompt: int, options: argparse.Namespace) -> list[str]:
    """Cells of a row: seconds of full attention, of ours and of the definition to read a prompt, then milliseconds a
    step."""
    full, ours = models
    clock = time.process_time if options.processor_time else time.perf_counter
    ids = torch.randint(0, 49000, (prompt,), generator=torch.Generator().manual_seed(1))
    # By name (seconds to read, seconds a step), the shortest.
    best: dict[str, tuple[float, float]] = {}
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "full": lambda: by_full_attention(full, ids, clock),
        "blockwise": lambda: by_landmarks(ours, ids, "blockwise", clock),
    }
    if prompt <= options.definition:
        ways["eager"] = lambda: by_landmarks(ours, ids, "eager", clock)
    for _ in range(options.times):
        for name, way in ways.items():
            best[name] = tuple(map(min, zip(way(), best.get(name, (1e9, 1e9)), strict=True)))
    (read, step), (our_read, our_step) = best["full"], best["blockwise"]
    definition = f"{best['eager'][0] / our_read:.1f}" if "eager" in best else "-"
    cells = [f"{read:.2f}", f"{our_read:.2f}", f"{our_read / read:.2f}", definition, f"{prompt / our_read:,.0f}"]
    beside = [f"{1e3 * step:.1f}", f"{our_step / step:.2f}"] if step else ["-", "-"]
    return [*cells, beside[0], f"{1e3 * our_step:.1f}", beside[1]]


@torch.no_grad()
def by_full_attention(model: PreTrainedModel, ids: torch.Tensor, clock: Clock) -> tuple[float, float]:
    """Seconds to read a prompt, and of a step behind it; 0 of a model without a cache."""
    cached = isinstance(model, LlamaForCausalLM)
    given = {"past_key_values": DynamicCache(config=model.config), "use_cache": True} if cached else {}
    read = seconds(lambda: model(input_ids=ids[None], logits_to_keep=1, **given), clock)
    if not cached:
        return read, 0.0
    return read, seconds(lambda: [model(input_ids=ids[None, :1], **given) for _ in range(STEPS)], clock) / STEPS


def by_landmarks(model: PreTrainedModel, ids: torch.Tensor, backend: str, clock: Clock) -> tuple[float, float]:
    """The same through the block cache."""
    os.environ["LANDMARK_ATTENTION"] = backend
    reader = BlockReader(model)
    reader.expect(len(ids) + STEPS)
    read = seconds(lambda: list(reader.read([ids], last_only=True)), clock)
    return read, seconds(lambda: [reader.step([5]) for _ in range(STEPS)], clock) / STEPS


def seconds(work: Callable[[], object], clock: Clock) -> float:
    began = clock()
    work()
    return clock() - began


def report(rows: list[list[str]], options: argparse.Namespace) -> str:
    head = ["shape", "dtype", "prompt", "full, s", "landmark, s", "ratio", "definition / landmark", "tokens/s"]
    head += ["full, ms a step", "landmark, ms a step", "ratio"]
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    extensions = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(name)]
    lines = [
        "# Reading on a CPU",
        "",
        f"{capabilities.get('cpu_name', platform.processor())} ({', '.join(extensions)}), {os.cpu_count()} processors, "
        f"{torch.get_num_threads()} threads; torch {torch.__version__}, transformers {transformers.__version__}. "
        f"The shortest of {options.times} times each, in turn"
        f"{', in seconds of the processor, which other work shared' if options.processor_time else ''}.",
        "",
        "| " + " | ".join(head) + " |",
        "|---|---|" + "---:|" * (len(head) - 2),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
