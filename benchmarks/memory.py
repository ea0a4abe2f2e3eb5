"""Reading a long text once and asking many times: a memory file's questions beside the first one, which reads it all.

    python benchmarks/memory.py --output benchmarks/results/memory-MACHINE.md
    python benchmarks/memory.py --shapes gpt --tokens 16384 --folder /tmp

Models of these shapes with random weights, in bfloat16 on a GPU. The first question: the text and the question are
read and the first new token is chosen. A later one: the reader goes on from the file (`Reader.recall`), the question is
read, and the first new token is chosen; the file is in the operating system's cache, as one that was just written or
asked is. The second question opens the file and fetches the blocks that it chooses, the third fetches the rest, the
fourth records a CUDA graph; the median is of all but the second. What a new token takes after that is the same for
all. "blocks lie in": cpu for `--offload cpu`. "bound": a copy to the GPU, from pinned host memory, of as many bytes as
the memory's blocks take.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from long_context_steps import Run, gpt, llama

import landmark_cli
from landmark_cli.inference.reader import Reader

GPU = torch.cuda.is_available()
SHAPES = {
    "gpt": ("12 x 1024", lambda run: gpt(run)),
    "smollm2": ("SmolLM2-135M's shape", lambda run: llama("smollm2", run)),
    "8b": ("Llama-3-8B's shape, k 8", lambda run: llama("8b", run, top_k_blocks=8)),
}


def now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def read(reader: Reader, ids: torch.Tensor) -> None:
    """Read a text and choose the token after it."""
    for chunk in reader.read([ids], last_only=True):
        logits = chunk.logits
    logits[:, -1].argmax(-1).tolist()


def bound(nbytes: int) -> float:
    """Seconds of a copy of so many bytes to the GPU from pinned memory, by a gigabyte at most; nan without one."""
    if not GPU:
        return float("nan")
    size = min(nbytes, 1 << 30)
    host, device = torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.empty(size, dtype=torch.uint8).cuda()
    device.copy_(host)
    began = now()
    device.copy_(host)
    return (now() - began) * nbytes / size


def row(shape: str, options: argparse.Namespace, offload: str) -> str:
    name, build = SHAPES[shape]
    model = build(Run(layers=options.layers))
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size - 300
    text = torch.randint(0, vocabulary, (options.tokens,), generator=draw)
    questions = torch.randint(0, vocabulary, (options.questions, options.question_tokens), generator=draw)
    reader = Reader(model, offload=offload)
    reader.expect(options.tokens + 4096)
    read(reader, torch.cat([text[: 3 * reader.chunk], questions[0]]))
    first = []
    for question in questions[:2]:
        reader.reset()
        reader.expect(options.tokens + 4096)
        began = now()
        read(reader, torch.cat([text, question]))
        first.append(now() - began)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "text.memory"
        reader.reset()
        reader.expect(options.tokens + 4096)
        read(reader, text)
        reader.save(path)
        nbytes = path.stat().st_size
        opened, later = [], []
        for question in questions:
            reader.reset()
            began = now()
            reader.recall(path)
            opened.append(now() - began)
            read(reader, question)
            later.append(now() - began)
    median, opening = statistics.median(later[1:]), statistics.median(opened[1:])
    return (
        f"| {name} | {offload} | {min(first) * 1e3:.0f} ms | {later[0] * 1e3:.0f} ms | {later[1] * 1e3:.0f} ms | "
        f"{median * 1e3:.1f} ms ({opening * 1e3:.1f} of it opening) | {median / min(first):.3f} | "
        f"{nbytes / 1e9:.2f} GB, {bound(nbytes) * 1e3:.0f} ms |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--question-tokens", type=int, default=20)
    parser.add_argument("--layers", type=int, help="of every model, instead of its own number")
    parser.add_argument("--folder", type=Path, help="where memory files go for the while of a measurement")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = [
        f"# Reading once, asking {options.questions} times: {torch.cuda.get_device_name() if GPU else 'CPU'}",
        "",
        f"torch {torch.__version__}, landmark {landmark_cli.__version__}; {options.tokens:,} tokens, questions of "
        f"{options.question_tokens}; `benchmarks/memory.py` says what is measured",
        "",
        "| model | blocks lie in | first question | second | third | later (median) | later / first | file, bound |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    print("\n".join(lines), flush=True)
    for shape in options.shapes:
        for offload in ("none", "cpu") if GPU else ("none",):
            try:
                lines.append(row(shape, options, offload))
            except torch.cuda.OutOfMemoryError as error:
                lines.append(f"| {SHAPES[shape][0]} | {offload} | out of memory: {str(error)[:80]} |")
            print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
