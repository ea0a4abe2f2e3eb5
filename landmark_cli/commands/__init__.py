"""The commands: what `landmark --help` shows of each, and where the rest of it stands.

A command's module has the dataclass of its options and the function that does the work. It is imported when that
command is wanted, so that a help that shows only names and summaries costs no more than these.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

# Given the options, does the work and returns what it made.
Work = Callable[[Any], Any]


class Command(NamedTuple):
    """One command.

    words: on the command line; a command of two words ("eval perplexity") stands in a group.
    summary: the first paragraph of its help, which is the first one of the options dataclass's docstring too.
    examples: command lines, one a line, which end its help.
    load: imports its module; returns the options dataclass and the function that does the work.
    """

    words: str
    summary: str
    examples: str
    load: Callable[[], tuple[type, Work]]

    @property
    def options_class(self) -> type:
        """The dataclass of its options."""
        return self.load()[0]


def _in(module: str, options_class: str, run: str = "run") -> Callable[[], tuple[type, Work]]:
    """What `load` is for a command of a module of this package, by the names of its class and its function."""

    def load() -> tuple[type, Work]:
        found = importlib.import_module(f"{__name__}.{module}")
        return getattr(found, options_class), getattr(found, run)

    return load


COMMANDS = [
    Command(
        "prepare",
        "Turn text into token files that training and evaluation read.",
        """
landmark prepare
landmark prepare pg19 --source ~/pg19
landmark prepare pg19
landmark prepare redpajama --source RedPajama-Data-1T-Sample --tokenizer meta-llama/Llama-2-7b-hf
landmark prepare text --source notes/ --source thesis.tex --output data/mine
landmark prepare text --chat --source chats.jsonl --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct --output data/chats
landmark prepare passkey --longest 8192 --tokenizer meta-llama/Llama-2-7b-hf
landmark prepare tasks --haystack books/ --longest 8192 --max-documents 20000 --tokenizer meta-llama/Llama-3.2-1B
accelerate launch --num_processes 8 landmark prepare arxiv-math
""",
        _in("prepare", "PrepareOptions"),
    ),
    Command(
        "train",
        "Train the paper's language model, or its baseline, on prepared token files.",
        """
accelerate launch landmark train
landmark train --data data/pg19 --output runs/pg19-landmark --compile
landmark train --recipe demo/tiny --device cpu
landmark train --recipe pg19/landmark --dry-run
landmark train --data data/pg19 --output runs/pg19-landmark --compile --resume
""",
        _in("train", "TrainOptions"),
    ),
    Command(
        "finetune",
        "Give a pretrained decoder landmark attention and fine-tune it.",
        """
landmark finetune --model HuggingFaceTB/SmolLM2-135M-Instruct
landmark finetune --model HuggingFaceTB/SmolLM2-135M --data notes/ --tasks-share 0.3
landmark finetune --model meta-llama/Llama-3.2-1B --data emozilla/pg19 --lora-rank 16 --merge
landmark finetune --model HuggingFaceTB/SmolLM2-135M --data books/ --data data/tasks --data-weights 3,7
landmark finetune --model llama-7b --data sample --sequence-length 512 --gradient-checkpointing --output runs/llama
accelerate launch --config_file recipes/llama/fsdp_8gpu.yaml landmark finetune --recipe llama/finetune_7b --model llama
""",
        _in("finetune", "FinetuneOptions"),
    ),
    Command(
        "eval perplexity",
        "Perplexity and accuracy of a model on a token file, overall and by chunk.",
        """
landmark eval perplexity --model runs/pg19-landmark --data data/pg19/validation.bin --eval-length 4096 --top-k-blocks 4
landmark eval perplexity --eval-length 2048 --sample-tokens 100000 --json perplexity.json
landmark eval perplexity --model runs/pg19-landmark --no-memory --eval-length 512
landmark eval perplexity --model runs/pg19-baseline --data data/pg19 --eval-length 360
""",
        _in("evaluate", "PerplexityOptions", "run_perplexity"),
    ),
    Command(
        "eval longppl",
        "Perplexity of the tokens that need a long context (LongPPL), beside that of all tokens.",
        """
landmark eval longppl --model runs/llama-landmark --data data/books --top-k-blocks 4,16
landmark eval longppl --model runs/llama-landmark --evaluator meta-llama/Llama-3.1-8B --eval-length 32768
landmark eval longppl --model HuggingFaceTB/SmolLM2-135M --eval-length 8192 --sample-tokens 200000 --json longppl.json
""",
        _in("longppl", "LongPerplexityOptions"),
    ),
    Command(
        "eval study",
        "Measure a list of settings over one or several models and put them in one table.",
        """
landmark eval study table1 --role landmark=runs/pg19-landmark --role baseline=runs/pg19-baseline --data data/pg19
landmark eval study table2 --role landmark=runs/pg19-landmark --sample-tokens 200000 --plot
landmark eval study my-study.yaml --role landmark=runs/demo --output studies/mine
landmark eval study my-ruler.yaml --role landmark=runs/mine --role untouched=runs/base --samples 20 --haystack novels/
""",
        _in("study", "StudyOptions"),
    ),
    Command(
        "eval ruler",
        "Ask a model RULER's synthetic tasks at several lengths, in several ways of reading.",
        """
landmark eval ruler --model runs/llama-landmark --lengths 4096,16384,65536 --top-k-blocks 4,16 --full-attention
landmark eval ruler --model runs/llama-landmark --tasks niah_single_2,vt,fwe --lengths 1000000 --samples 5 --show 1
landmark eval ruler --model HuggingFaceTB/SmolLM2-135M-Instruct --full-attention --chat --plot ruler.png
landmark eval ruler --tasks qa --qa dev-v2.0.json --haystack novels/ --json ruler.json
""",
        _in("ruler", "RulerOptions"),
    ),
    Command(
        "eval passkey",
        "Hide a number in filler text, or in --haystack, and ask the model for it.",
        """
landmark eval passkey --model runs/llama-landmark --lengths 2048,4096,8192,16384 --prompts 20
landmark eval passkey --model runs/llama-landmark --lengths 1000000 --depths 5 --prompts 2 --top-k-blocks 4
landmark eval passkey --model runs/llama-landmark --haystack novels/ --lengths 4096,65536
landmark eval passkey --model HuggingFaceTB/SmolLM2-135M-Instruct --full-attention --depths 5 --plot passkey.png
""",
        _in("evaluate", "PassKeyOptions", "run_passkey"),
    ),
    Command(
        "generate",
        "Continue a text of any length; the text goes to standard output as it comes.",
        """
landmark generate --prompt "It was the best of times"
landmark generate --model runs/pg19-landmark --prompt-file novel.txt --top-k-blocks 4 --max-new-tokens 500
cat novel.txt | landmark generate --temperature 0 --stop "CHAPTER"
landmark generate --prompt-file novel.txt --save-memory novel.memory --max-new-tokens 0
landmark generate --memory novel.memory --prompt "Who did it? It was"
landmark generate --prompt-file novel.txt --trace answer.html
""",
        _in("generate", "GenerateOptions"),
    ),
    Command(
        "serve",
        "Answer requests over HTTP, as OpenAI's API does.",
        """
landmark serve --model runs/pg19-landmark
landmark serve --model runs/llama-landmark --host 0.0.0.0 --rows 64 --memory-budget 32 --memory-dir memories
landmark serve --model runs/llama-landmark --name llama --max-prompt-tokens 1000000 --offload cpu
""",
        _in("serve", "ServeOptions"),
    ),
    Command(
        "plan",
        "Say what reading with blocks takes and what a token sees, by settings, without reading.",
        """
landmark plan --model runs/pg19-landmark
landmark plan --model runs/llama-landmark --lengths 131072,1000000 --top-k-blocks 4,8,16 --offload cpu
landmark plan --model HuggingFaceTB/SmolLM2-135M --landmark-freq 31,63,127 --sequence-length 2048 --dtype bfloat16
""",
        _in("reading_plan", "PlanOptions"),
    ),
    Command(
        "plot",
        "Draw the course of runs, or the tables of RULER.",
        """
landmark plot runs/pg19-landmark runs/pg19-baseline --out runs.png
landmark plot untouched.json distilled.json --out ruler.png
""",
        _in("plot", "PlotOptions"),
    ),
    Command(
        "models export",
        "Make a model of a checkpoint of a run.",
        """
landmark models export runs/pg19-landmark
landmark models export runs/pg19/checkpoints/step-00001000 --output models/early
""",
        _in("export", "ExportOptions"),
    ),
    Command(
        "weight-diff make",
        "Write the difference of a fine-tuned model from its raw weights, to be published without the raw weights.",
        """
landmark weight-diff make --path-raw llama-7b --path-tuned runs/llama-landmark --path-diff llama-landmark-diff
landmark weight-diff make --path-raw huggyllama/llama-7b --path-tuned runs/llama-landmark --path-diff diff --overwrite
""",
        _in("weight_diff", "MakeOptions", "run_make"),
    ),
    Command(
        "weight-diff recover",
        "Make a fine-tuned model of its raw weights and its difference from them.",
        """
landmark weight-diff recover --path-raw llama-7b --path-diff llama-landmark-diff --path-tuned runs/llama-landmark
landmark weight-diff recover --path-raw llama-7b --path-diff epfml/landmark-attention-llama7b-wdiff --path-tuned tuned
""",
        _in("weight_diff", "RecoverOptions", "run_recover"),
    ),
]

GROUPS = {
    "models": "Make models of what runs have kept.",
    "eval": "Measure a model on held-out text.",
    "weight-diff": "Publish a fine-tuned model as its difference from weights that may not be passed on.",
}
