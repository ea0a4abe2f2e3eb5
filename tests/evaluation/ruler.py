"""What the tests of RULER's tasks share: two tokenizers, and models that know every answer or none."""

import functools
from types import SimpleNamespace

import torch

from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.evaluation.ruler.benchmark import GENERATED, make_task
from landmark_cli.evaluation.ruler.encoding import PromptEncoder
from landmark_cli.evaluation.ruler.haystacks import Prose
from tests.awkward_tokenizers import byte_tokenizer
from tests.tiny import tiny_llama

GPT2 = load_tokenizer("gpt2").as_transformers()
# A short and a long prompt of every task, by the tokenizer; of words it takes longer ones in bytes.
LENGTHS = {"gpt2": (1100, 1700), "bytes": (2700, 3900)}
LENGTHS_OF_CWE = {"gpt2": (1100, 4500), "bytes": (8200, 9000)}


@functools.cache
def tokenizer_of(name):
    return GPT2 if name == "gpt2" else byte_tokenizer(adds="<s> $A </s>")


@functools.cache
def novels_of(tokenizer, chat):
    """An encoder, and the shipped novels as it encodes them: the sentences that one test has had encoded serve the
    next."""
    encoder = PromptEncoder(tokenizer, chat=chat)
    return encoder, Prose(encoder)


def tasks_of(tokenizer, names=GENERATED, *, seed=0, haystack=None, chat=False, documents=None):
    """The tasks by name."""
    encoder, prose = novels_of(tokenizer, chat)
    if haystack is not None:
        prose = Prose(encoder, haystack)
    return {name: make_task(name, encoder, prose, seed, documents) for name in names}


class Oracle(torch.nn.Module):
    """A model that answers the prompts it knows by what `answers` says: {prompt tokens: text}."""

    def __init__(self, tokenizer, answers):
        super().__init__()
        self.config = tiny_llama(max_position_embeddings=100_000, vocab_size=50304).config
        self.device, self.end = torch.device("cpu"), tokenizer.eos_token_id
        self.answers = {prompt: [*tokenizer.encode(answer), self.end] for prompt, answer in answers.items()}
        self.asked = 0

    def forward(self, input_ids, logits_to_keep=None, use_cache=False):
        logits = torch.zeros(len(input_ids), len(logits_to_keep), self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            length, answer = next(
                (len(prompt), answer) for prompt, answer in self.answers.items() if tuple(ids[: len(prompt)]) == prompt
            )
            self.asked += len(ids) == length
            logits[row, :, answer[min(len(ids) - length, len(answer) - 1)]] = 1.0
        return SimpleNamespace(logits=logits)
