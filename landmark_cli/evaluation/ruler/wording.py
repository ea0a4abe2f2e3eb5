"""The benchmark's texts, word for word, its mistakes included ("assgined"): whoever changes one measures another thing.

Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?" (arXiv 2404.06654)
and its generator, github.com/NVIDIA/RULER, scripts/data/synthetic (Apache-2.0). A template ends where the answer
begins. The space that stands there in the benchmark's variable tracking is left to the answer, as lm-eval leaves it: a
model that was trained on words with the space in front of them has seen no text that ends with one.
"""

from __future__ import annotations

from typing import NamedTuple


class Template(NamedTuple):
    """A prompt: what stands in front of the haystack, what behind it, and the beginning of the answer."""

    head: str
    tail: str
    answer: str


NEEDLE = "One of the special magic {kind} for {key} is: {value}."
# Where one value is asked for, the benchmark puts its plurals into the singular. kind: "number" or "uuid".
ONE = Template(
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)
# kind: "numbers" or "uuids".
SEVERAL = Template(
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)

TRACKING = Template(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "\nQuestion: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {query}, they are:",
)
# What stands between the worked example's last name and the question itself.
BEHIND_EXAMPLE = "\n\n\n\n"

COMMON_WORDS = Template(
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n",
    "\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)

FREQUENT_WORDS = Template(
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words.",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
DOTS = "..."

QUESTION = Template(
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n",
    "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nQuestion: {query}",
    " Answer:",
)
DOCUMENT_LABEL = "Document {number}:\n"
