"""Texts for GPT-2's tokenizer and those that read as it does."""

import numpy as np

KNOWN = {
    "Hello world": [15496, 995],
    "": [],
    " the  the\n\n the": [262, 220, 262, 628, 262],
    "It's 1859, naïve": [1026, 338, 1248, 3270, 11, 41492],
}
ODD = [
    "\r\n\t \u00a0\u3000x\u2028y\u200b z  \n",
    "🙂👩‍👩‍👧 中文 e\u0301 ß ﬁ Ⅷ ²½ ٣",
    "<|endoftext|><landmark> is text here",
    "a" * 5000 + " " * 3000 + "=-" * 500,
    "\x00\x1c\x85 don't DON'T I'LL we’ve",
]


def as_lists(arrays):
    assert all(array.dtype == np.uint32 for array in arrays)
    return [array.tolist() for array in arrays]
