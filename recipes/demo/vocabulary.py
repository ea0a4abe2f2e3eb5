"""A small vocabulary for the shipped model, learned from the novels that the package holds, without the one held out,
and from as much text that states facts and asks for them.

    python recipes/demo/vocabulary.py --output data/demo/tokenizer

Byte-level byte-pair encoding, as GPT-2's is. Every digit is a token of its own, so that a number is copied digit by
digit and none is rarer than another. By the novels alone a name that no novel has would be spelt: a fact would take
29 tokens in place of 20, and its value, all of whose tokens have to be right, 8.4 in place of 6.4.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from landmark_cli.data.corpora import SAMPLE_HELD_OUT, novels
from landmark_cli.data.gpt2_tokenizer import END_OF_TEXT
from landmark_cli.data.tasks.kinds import Draw, draw_task
from landmark_cli.data.tasks.questions import ending

# With the landmark's, which a model's tokenizer has besides, 80 rows of 64.
SIZE = 5119
# About as many characters as the novels have.
TASKS, FACTS = 3000, 8
KINDS = ("completion", "inventory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the tokenizer")
    parser.add_argument("--size", type=int, default=SIZE, help=f"tokens, the one that ends a text included ({SIZE})")
    parser.add_argument("--tasks", type=int, default=TASKS, help=f"tasks whose words are learned too ({TASKS})")
    options = parser.parse_args()
    texts = [text.decode() for title, text in novels().items() if title != SAMPLE_HELD_OUT]
    learned([*texts, *said(options.tasks)], options.size).save_pretrained(options.output)
    print(f"{options.output}: {options.size} tokens, learned from {len(texts)} novels and {options.tasks} tasks")


def said(tasks: int) -> Iterator[str]:
    """What so many tasks state and ask, each as one text. They are of no seed that documents are made of."""
    for number in range(tasks):
        generator = np.random.default_rng([0, number, 2])
        task = draw_task(Draw(generator, "", FACTS, absent=0.0), KINDS)
        yield "\n".join([*task.hidden, str(ending(task.asked, generator))])


def learned(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` tokens learned from texts: the 256 bytes and the end-of-text token are among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


if __name__ == "__main__":
    main()
