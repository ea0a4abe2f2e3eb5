"""Decoding steps of tiny models, and how far they are from what float32 gives: by a model's modules, and fused.

Which blocks a query chooses is decided by scores that rounding may tell apart the other way, and of a tiny random model
another block is another answer. So what is measured are the rows whose queries all chose what they choose in float32,
and, beside, how many queries chose otherwise. On a CPU in bfloat16 (7 families, 40 steps, 2 blocks of up to 17) 0.5 to
1.4% of queries do; rows are off by 16 to 41% of their size at most where one did, by 3% where none did. That products
are not rounded before they are added, in the rotation alone, is enough for 31% between two such models.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from landmark_cli.attention.cache import BlockCache, Trace
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.models.decoders import attend_with_landmarks
from landmark_cli.models.quantization import QuantizedLinear, encode, quantize
from landmark_cli.models.quantized_products import product_class
from landmark_cli.models.support import check_model
from tests.inference.test_graphs import Repeated
from tests.models.families import tiny_decoder
from tests.tiny import tiny_text

# Families of tests.models.families whose modules are known; see models/known_layers.py.
KNOWN = ["llama", "llama-tied", "llama-llama3", "mistral", "mistral-wide-window", "qwen2", "qwen2-local", "qwen3"]
KNOWN += ["ministral", "smollm3", "gemma2", "gemma2-unbounded", "gemma3"]
LANDMARKS = {"landmark_freq": 4, "landmark_token_id": 299, "trained_length": 40, "top_k_blocks": 2}
# Wide enough for weights in 4 bits.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 2}
WIDE |= {"num_key_value_heads": 1, "initializer_range": 0.1}
# As many blocks are read as are kept: nothing is chosen.
ALL_BLOCKS = {"top_k_blocks": 4, "cache_blocks": 4}
# What is allowed: errors of fused steps, as a multiple of those of the modules, of all rows and of the worst; to it is
# added, of a row's size, what float32 leaves open.
TIMES, WORST_TIMES, FLOOR = 1.5, 2.0, 2e-3
# The same for the share of queries that chose other blocks than in float32.
FLIPPED_TIMES, FLIPPED_FLOOR = 2.0, 0.02


def landmark_decoder(family: str = "llama", **settings) -> PreTrainedModel:
    model = tiny_decoder(family, **settings)
    for name, value in LANDMARKS.items():
        setattr(model.config, name, value)
    attend_with_landmarks(model, check_model(model, LANDMARKS["trained_length"], family))
    return model


class Models(NamedTuple):
    """held: with weights in the dtype or quantization that is asked for. exact: in float32, of the same weights."""

    held: PreTrainedModel
    exact: PreTrainedModel


def models(family: str, kind: str, device: torch.device, **settings) -> Models:
    """kind: a quantization, or "none"; all else is in bfloat16."""
    held = landmark_decoder(family, **(WIDE | settings)).to(device, torch.bfloat16)
    exact = copy.deepcopy(held).float()
    if kind != "none":
        weights = {path: layer.weight for path, layer in held.named_modules() if isinstance(layer, nn.Linear)}
        quantize(held, kind, device)
        dtype = product_class(device).scale_dtype(torch.bfloat16)
        for path, layer in held.named_modules():
            if isinstance(layer, QuantizedLinear):
                decoded = encode(weights[path], layer.bits, dtype).weight()
                exact.get_submodule(path).weight = nn.Parameter(decoded, requires_grad=False)
    return Models(held, exact)


def steps(
    model: PreTrainedModel, fused: bool, count: int = 7, chosen: list[Tensor] | None = None, **options
) -> tuple[list[Tensor], BlockReader]:
    """Logits of steps behind a text, (B, vocabulary) each, as graphs give them, or what stands in for these. chosen: to
    be filled with the blocks that each step's queries read, (B, queries, k), by age."""
    reader = BlockReader(model, chunk=8, **options)
    reader.forward.recording, reader.forward.fuses_steps = True, fused
    if model.device.type == "cpu":
        reader.forward.record = lambda *given: Again(reader.cache, *given)
    list(reader.read([tiny_text(30, row) for row in range(reader.batch)]))
    reader.cache.trace = None if chosen is None else Trace()
    found = []
    for at in range(count):
        found.append(reader.step([7 + at] * reader.batch))
        if chosen is not None:
            ages = [ages.sort(-1).values.flatten(1, -2) for ages, *_ in reader.cache.trace.layers.values()]
            chosen.append(torch.cat(ages, dim=1).cpu())
    assert {kind[0] for kind in reader.forward._recorded} >= {1, 2}
    return found, reader


class Again(Repeated):
    """What it does again is written to the trace of the first time, too, as a graph does."""

    def __init__(self, cache: BlockCache, *given):
        super().__init__(*given)
        self.cache, self.traced = cache, {} if cache.trace is None else cache.trace.layers

    def replay(self) -> None:
        super().replay()
        for layer, kept in self.traced.items():
            for tensor, new in zip(kept, self.cache.trace.layers[layer], strict=True):
                tensor.copy_(new)


@dataclass(frozen=True)
class Errors:
    """Of steps, against float32. whole: the root mean square of the errors of rows, each as a share of the row's size,
    and worst: the largest, both of rows whose queries all chose the same blocks as there. flipped: the share of queries
    that did not. rows: how many did, as a share of all."""

    whole: float
    worst: float
    flipped: float
    rows: float

    def __str__(self) -> str:
        return f"{self.whole:.4f} (worst {self.worst:.4f}, {self.flipped:.2%} of choices differ)"


def errors(found: tuple[list[Tensor], list[Tensor]], exact: tuple[list[Tensor], list[Tensor]]) -> Errors:
    """Of logits and choices, as `steps` gives them."""
    a, b = (torch.stack(logits).double().cpu() for logits, _ in (found, exact))
    off = (a - b).norm(dim=-1) / b.norm(dim=-1)  # (steps, B), as same
    if not found[1]:
        return Errors(off.square().mean().sqrt().item(), off.max().item(), 0.0, 1.0)
    differ = [(x != y).any(-1) for x, y in zip(found[1], exact[1], strict=True)]
    same = ~torch.stack([x.any(-1) for x in differ])
    flipped = torch.cat([x.flatten() for x in differ]).double().mean().item()
    off = off[same] if same.any() else off.new_full((1,), torch.nan)
    return Errors(off.square().mean().sqrt().item(), off.max().item(), flipped, same.double().mean().item())


def compare(found: Models, chooses: bool, count: int = 40, batch: int = 2) -> tuple[Errors, Errors]:
    """Errors of steps by the modules, and of fused steps. chooses: whether there are more blocks than are read."""
    options = {"batch": batch} if chooses else {"batch": batch, **ALL_BLOCKS}
    runs = []
    for model, fused in ((found.exact, False), (found.held, False), (found.held, True)):
        chosen: list[Tensor] = []
        runs.append((steps(model, fused, count, chosen if chooses else None, **options)[0], chosen))
    exact, plain, fused = runs
    return errors(plain, exact), errors(fused, exact)


def why_not_alike(plain: Errors, fused: Errors) -> str | None:
    """What of fused steps is further from float32 than rounding makes it, or None."""
    checks = {
        "all rows": (fused.whole, TIMES * plain.whole + FLOOR),
        "choices": (fused.flipped, FLIPPED_TIMES * plain.flipped + FLIPPED_FLOOR),
    }
    if plain.rows == fused.rows == 1:
        # Else a row may read a token of which another layer has made something else, for other blocks.
        checks["the worst row"] = fused.worst, WORST_TIMES * plain.worst + FLOOR
    # A nan is within no bound.
    wrong = [f"{what}: {error:.4f}, allowed {most:.4f}" for what, (error, most) in checks.items() if not error <= most]
    if fused.rows < 0.5:
        wrong.append(f"in {1 - fused.rows:.0%} of rows some query chose other blocks")
    return "; ".join(wrong) or None
