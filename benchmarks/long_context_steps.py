"""What measurements of long contexts share: models with random weights, filled caches, one step of each kind."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.models.fused_step import FusedStep
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM

DEVICE = torch.device("cuda")
SHAPES = {
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0, "landmark_token_id": 128255},
    "smollm2": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
                "landmark_token_id": 49151},
    # The paper's model has no cache of the library's: its twin in Llama's clothes stands in for full attention.
    "gpt-like": {"vocab_size": 50304, "hidden_size": 1024, "intermediate_size": 2736, "num_hidden_layers": 12,
                 "num_attention_heads": 8, "num_key_value_heads": 8, "landmark_token_id": 50260},
}  # fmt: skip


@dataclass
class Run:
    """layers: of every model, None for its own. quick: only compile."""

    layers: int | None = None
    quick: bool = False

    def times(self, count: int) -> int:
        return 1 if self.quick else count


@contextmanager
def fresh() -> Iterator[None]:
    """Memory of its own, and the peak counted from here."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield


@contextmanager
def eager_attention() -> Iterator[None]:
    before = os.environ.get("LANDMARK_ATTENTION")
    os.environ["LANDMARK_ATTENTION"] = "eager"
    try:
        yield
    finally:
        os.environ.pop("LANDMARK_ATTENTION") if before is None else os.environ.update(LANDMARK_ATTENTION=before)


def build(cls, config, layers: int | None):
    if layers is not None:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            return cls(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def gpt(run: Run, **settings) -> GPTForCausalLM:
    return build(GPTForCausalLM, GPTConfig(**settings), run.layers)


def llama(shape: str, run: Run, top_k_blocks: int = 4) -> LlamaForCausalLM:
    landmarks = {"landmark_freq": 63, "trained_length": 8192, "top_k_blocks": top_k_blocks}
    config = LlamaConfig(**SHAPES[shape], **landmarks, max_position_embeddings=8192, attn_implementation="landmark")
    return build(LlamaForCausalLM, config, run.layers)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Device time of one call, after one that does not count."""
    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats / 1e3


def graph_seconds(work) -> float:
    """Device time of work as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = work()
    taken = seconds(graph.replay, 10)
    del kept
    return taken


def copy_seconds(nbytes: int) -> float:
    """Of a copy on the GPU that moves so many bytes, reads and writes counted, by 4 GiB at most."""
    size = min(nbytes // 2, 1 << 31)
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return seconds(lambda: target.copy_(source), 20) * nbytes / (2 * size)


def held_bytes(model: nn.Module) -> int:
    """Of the weights that a step reads: all but the embedding."""
    embedding = model.get_input_embeddings().weight.data_ptr()
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors if tensor.data_ptr() != embedding)


def gibibytes() -> float:
    return torch.cuda.max_memory_allocated() / 2**30


def fill(reader: BlockReader, text: int, share_storage: bool = False, room: int = 4096) -> None:
    """Make a reader's cache as if `text` tokens of each row had been read: random keys and values, zeros on the host.

    share_storage: all layers' blocks are one tensor, where more do not fit; their landmark keys stay their own. room:
    for text tokens to come.
    """
    cache, model = reader.cache, reader.model
    blocks = text // reader.landmark_freq
    cache.expect((text + room) * (reader.landmark_freq + 1) // reader.landmark_freq)
    cache.host_blocks, cache.host_tail = [blocks] * cache.batch, [0] * cache.batch
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    dim = model.config.hidden_size // model.config.num_attention_heads
    like = torch.empty(cache.batch, heads, 1, dim, dtype=torch.bfloat16, device=DEVICE)
    chunk = cache.begin_chunk([1] * cache.batch)
    for index in range(model.config.num_hidden_layers):
        layer = cache.layer(index, like, chunk)
        if share_storage and index > 0:
            layer.blocks = cache.layers[0].blocks
        elif layer.blocks.is_cuda:
            layer.blocks.normal_()
        # Tens of GiB of random numbers take minutes on the host: there the blocks, not their landmarks, are zeros.
        layer.landmark_keys.normal_()


def step_times(reader: BlockReader, run: Run, steps: int = 150) -> tuple[float, float]:
    """(seconds of a step's graph, seconds of a step of a greedy loop). The loop completes blocks on its way."""
    tokens = [1] * reader.cache.batch
    for _ in range(3 if run.quick else 2 * reader.landmark_freq + 5):
        tokens = reader.step(tokens).argmax(-1).tolist()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(run.times(steps)):
        tokens = reader.step(tokens).argmax(-1).tolist()
    loop = (time.perf_counter() - started) / run.times(steps)
    graphs = [recorded.graph for kind, recorded in reader.forward._recorded.items() if kind[:3] == (1, 1, True)]
    return seconds(graphs[-1].replay, run.times(100)), loop


def other_step(reader: BlockReader, run: Run, fused: bool) -> float:
    """Seconds of a step's graph recorded otherwise: by the model's own modules or `fused` (see
    landmark_cli/models/fused_step.py), all products a library's."""
    forward, kept = reader.forward, FusedStep.streams
    forward.fuses_steps, FusedStep.streams = fused, False
    forward._recorded.clear()
    forward.record_steps([(1, [0])])
    (recorded,) = forward._recorded.values()
    taken = seconds(recorded.graph.replay, run.times(100))
    forward.fuses_steps, FusedStep.streams = True, kept
    forward._recorded.clear()
    return taken


def eager_step(reader: BlockReader, run: Run) -> float:
    """Seconds of a step by the eager definition, over the same cache."""
    recording, reader.forward.recording = reader.forward.recording, False
    with eager_attention():
        taken = seconds(lambda: reader.step([1] * reader.cache.batch), run.times(3))
    reader.forward.recording = recording
    reader.cache.backends.discard("eager")
    return taken


def full_step(model: LlamaForCausalLM, context: int, batch: int, run: Run) -> tuple[float, float]:
    """Seconds of a step with full attention over `context` tokens: (DynamicCache, preallocated in a CUDA graph)."""
    config = model.config
    model.set_attn_implementation("sdpa")
    shape = batch, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads
    ids = torch.ones(batch, 1, dtype=torch.long, device=DEVICE)
    position = torch.full((batch, 1), context, device=DEVICE)
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)), layer)
    with torch.no_grad():
        dynamic = seconds(
            lambda: model(ids, position_ids=position, past_key_values=cache, use_cache=True), run.times(3)
        )
    cache = None
    gc.collect()

    stored = [torch.randn(2, *shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(config.num_hidden_layers)]

    def attend(module, q, k, v, mask, scaling=None, **kwargs):
        keys, values = stored[module.layer_idx]
        keys[:, :, -1:], values[:, :, -1:] = k, v
        out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register("preallocated", attend)
    transformers.AttentionMaskInterface.register("preallocated", lambda *a, **k: None)
    model.set_attn_implementation("preallocated")
    with torch.no_grad():
        for _ in range(2):
            model(ids, position_ids=position, use_cache=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(ids, position_ids=position, use_cache=False)
    preallocated = seconds(graph.replay, run.times(20))
    # The library keeps the function, and that all it names.
    stored.clear()
    model.set_attn_implementation("landmark")
    return dynamic, preallocated
