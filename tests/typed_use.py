"""A program that uses the package, for a type checker: it is checked, not run (see tests/test_public.py).

torch and transformers are Any here: following them takes the checker a minute.
"""

from pathlib import Path
from typing import assert_type

import landmark_cli
from landmark_cli import Generation, LandmarkCache, Reader, ReadingSettings, SamplingSettings

model, tokenizer = landmark_cli.load("runs/mine")
model, tokenizer = landmark_cli.load(Path("runs/mine"), device="cpu", attention=None)
landmark_cli.add_landmarks(model, tokenizer, landmark_freq=63)
sampling = SamplingSettings(max_new_tokens=3, temperature=0.0, stop=["\n"])
found = landmark_cli.generate(model, tokenizer, ["a", [1, 2]], sampling, reading=ReadingSettings(top_k_blocks=4))
assert_type(found, list[Generation])
assert_type(found[0].text, str)
assert_type(found[0].tokens, list[int])
reader = Reader(model, top_k_blocks=2, selection="max_over_heads", batch=2)
for chunk in reader.read([[1, 2], [3]]):
    assert_type(chunk.lengths, list[int])
assert_type(LandmarkCache(model, ReadingSettings(top_k_blocks=2), reader=reader).get_seq_length(), int)
out, lse = landmark_cli.landmark_attention(model, model, model, 64, return_lse=True)

# What a checker has to find: an ignore that hides nothing is an error.
landmark_cli.load(3)  # type: ignore[arg-type]
landmark_cli.add_landmarks(model)  # type: ignore[call-arg]
landmark_cli.generate(model, tokenizer, "one text", sampling.seed)  # type: ignore[arg-type]
SamplingSettings(temperatur=0.0)  # type: ignore[call-arg]
ReadingSettings(selection="by_luck")  # type: ignore[arg-type]
Reader(model, offload="disk")  # type: ignore[arg-type]
LandmarkCache(model, 3)  # type: ignore[arg-type]
nothing = landmark_cli.nothing  # type: ignore[attr-defined]
