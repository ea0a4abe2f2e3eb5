"""Layers compiled one by one: the code of one serves all, step after step, and learns what they learn uncompiled."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.utils import counters

from landmark_cli.attention import backends
from landmark_cli.attention.kernels.common.tensors import empty_heads_last
from landmark_cli.attention.reference import landmark_attention
from landmark_cli.attention.window import WindowSettings
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.models.lora import LoraSettings, add_adapters
from landmark_cli.training import compiled
from landmark_cli.training.distillation import Distillation, DistillationLoss
from landmark_cli.training.setup import checkpoint_activations
from landmark_cli.training.teachers import Teacher, UntouchedRows, WithoutAdapters
from tests.closeness import assert_close_norm
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.training.test_distillation import FREQ, batch_of, some_texts, step


def heads_last(x):
    """As the kernels leave it in memory."""
    return empty_heads_last(x).copy_(x)


def forward(q, k, v, sinks, block_size, scale, *others):
    out, lse = landmark_attention(q, k, v, block_size=block_size, scale=scale, return_lse=True)
    return heads_last(out), lse.contiguous()


def backward(dout, dlse, q, k, v, sinks, out, lse, *settings):
    def differentiate():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        found = landmark_attention(*leaves, block_size=settings[0], scale=settings[1], return_lse=True)
        gradients = torch.autograd.grad(found, leaves, (dout, torch.zeros_like(lse) if dlse is None else dlse))
        return map(heads_last, gradients)

    # An operator is called below autograd, which is a matter of its thread.
    with ThreadPoolExecutor(1) as other:
        return *other.submit(differentiate).result(), None


def retrieve_forward(q, k, v, own, own_lse, chunks, blocks, *others):
    """Finds nothing: a step's numbers are others then, not its code."""
    routes = [q.new_empty((k.shape[1], 1), dtype=dtype) for dtype in (torch.int16, torch.int64, torch.int32)]
    return heads_last(own), own_lse.contiguous().clone(), *routes


def retrieve_backward(dout, dlse, q, k, v, out, lse, *others):
    return *(heads_last(torch.zeros_like(x)) for x in (q, k, v)), heads_last(dout), torch.zeros_like(lse)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Instead of the kernels what can be told from them by nothing that torch.compile sees, and takes no time."""
    theirs = backends.BACKENDS["triton"]
    fast = {"forward": forward, "backward": backward}
    fast |= {"retrieve_forward": retrieve_forward, "retrieve_backward": retrieve_backward}
    monkeypatch.setitem(backends.BACKENDS, "triton", dataclasses.replace(theirs, why_not=lambda _: None, **fast))
    monkeypatch.setenv("LANDMARK_ATTENTION", "triton")
    torch._dynamo.reset()
    counters.clear()
    # What is set meanwhile is put back.
    settings = {"suppress_errors": False, "recompile_limit": 8, "optimize_ddp": True, compiled.TOLD_ONCE: False}
    known = {name: value for name, value in settings.items() if hasattr(torch._dynamo.config, name)}
    with torch._dynamo.config.patch(**known):
        yield
    torch._dynamo.reset()


def pair(layers, *, family="llama", lora=False, read=False, checkpointing=None, gate=False, **settings):
    """(loss, how it is distilled, the models whose layers run) of a decoder of so many layers. gate: with its loss,
    which in windows that are read chunk by chunk is of the joint softmax. settings: of the decoder's config."""
    student, untouched = (tiny_decoder(family, num_hidden_layers=layers, **settings) for _ in range(2))
    untouched.load_state_dict(student.state_dict())
    rows = UntouchedRows(student)
    joint = gate and read
    softmax = "joint" if joint else "grouped"
    add_landmarks(student, tiny_tokenizer(), landmark_freq=FREQ, trained_length=60, softmax=softmax)
    model = add_adapters(student, LoraSettings(2, 4.0)) if lora else student
    teacher = WithoutAdapters(model, rows) if lora else Teacher(untouched)
    teacher.length = 512
    if checkpointing is not None:
        checkpoint_activations(student, checkpointing)
    window = WindowSettings(2 * (FREQ + 1), FREQ + 1, 2, joint=joint) if read else None
    of_gate = {"joint": joint, "chunk": window.chunk if read else None, "block_size": FREQ + 1} if gate else {}
    how = Distillation(teacher, "self", student.config.landmark_token_id, gate_weight=float(gate), **of_gate)
    return DistillationLoss(model, how, 0.0, True, False, window).train(), how, [student, teacher.model]


def gradients(loss, how, seed):
    batch = batch_of(some_texts(length=50, seed=seed), how.landmark_token_id, [(0, 3)])
    batch = {name: values.to(next(loss.parameters()).device) for name, values in batch.items()}
    value = step(loss, [batch], how)[0]
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    return value.detach(), torch.autograd.grad(value, trained, allow_unused=True)


def evaluated(loss, how):
    batch = batch_of(some_texts(length=50), how.landmark_token_id)
    with torch.no_grad():
        found = loss.eval()(batch["input_ids"], batch["labels"])
    loss.train()
    return found


# With what is compiled: the student's layer in training and evaluation, and the teacher's. That all landmarks are one
# vector is known to the first layer alone, where it reads chunk by chunk. Checkpointed layers are given the embeddings
# with a gradient, in evaluation too.
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
WAYS = {
    "as it is": ({}, 3),
    "checkpointed": ({"checkpointing": False}, 4),
    "read chunk by chunk": ({"read": True}, 5),
    "read, retrieved kept": ({"read": True, "checkpointing": True}, 5),
    "LoRA": ({"lora": True}, 3),
    # In evaluation no teacher is asked for the gate's sake: its layers' code is one more.
    "gate": ({"gate": True}, 4),
    "gate, checkpointed": ({"gate": True, "checkpointing": False}, 5),
    "gate, read chunk by chunk": ({"gate": True, "read": True}, 6),
    "gate, LoRA": ({"gate": True, "lora": True}, 4),
    "gate, some layers without landmarks": ({"gate": True, "family": "gemma3", **TWO_KINDS}, 8),
}


# What the others have together.
LONG = "checkpointed", "read chunk by chunk", "gate, checkpointed", "gate, LoRA", "gate, some layers without landmarks"


@pytest.mark.parametrize(
    ("way", "graphs"),
    [pytest.param(*WAYS[name], marks=pytest.mark.slow if name in LONG else (), id=name) for name in WAYS],
)
def test_layers_share_what_is_compiled_and_keep_it(way, graphs):
    loss, how, models = pair(4, **way)
    names = [name for name, _ in loss.named_parameters()]
    expected = [gradients(loss, how, seed) for seed in (0, 1)]
    loss_of_windows = evaluated(loss, how)
    for model in {id(model): model for model in models}.values():
        compiled.compile_layers(model, "aot_eager")
    assert [name for name, _ in loss.named_parameters()] == names
    assert_close_norm(gradients(loss, how, 0), expected[0])
    assert_close_norm(evaluated(loss, how), loss_of_windows)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close_norm(gradients(loss, how, 1), expected[1])
        assert_close_norm(evaluated(loss, how), loss_of_windows)


@pytest.mark.parametrize(
    ("joint", "gate"), [(False, False), (False, True), (True, True)], ids=["no gate", "gate", "gate, joint"]
)
def test_what_is_compiled_serves_windows_of_any_number_of_documents(joint, gate):
    loss, how, models = pair(2, gate=gate)
    how = loss.distillation = dataclasses.replace(how, joint=joint)
    loss.wrapped.config.landmark_softmax = "joint" if joint else "grouped"
    width = batch_of(some_texts(length=50), how.landmark_token_id)["input_ids"].shape[1]

    def found(*ends):
        batch = batch_of(some_texts(length=50), how.landmark_token_id, [(0, 3)])
        batch["cu_seqlens"] = torch.tensor([0, *ends, width, 2 * width], dtype=torch.int32)
        value = step(loss, [batch], how)[0]
        return value.detach(), torch.autograd.grad(value, [p for p in loss.parameters() if p.requires_grad])

    # A teacher that reads one document a row needs no mask, and is compiled for that by itself.
    documents = (20,), (10, 15, 40), (5, 10, 15, 20, 25, 30)
    expected = [found(*ends) for ends in documents]
    for model in models:
        compiled.compile_layers(model, "aot_eager")
    assert_close_norm(found(*documents[0]), expected[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for ends, wanted in zip(documents, expected, strict=True):
            assert_close_norm(found(*ends), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt-neox", "gemma3"])
def test_compiled_by_inductor_they_learn_the_same(family):
    # Of gemma3's two layers one keeps its sliding window.
    loss, how, models = pair(2, family=family)
    expected = gradients(loss, how, 0)
    for model in models:
        compiled.compile_layers(model)
    assert_close_norm(gradients(loss, how, 0), expected)
