"""What of a run follows from the memory there is."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from landmark_cli.attention.window import WindowSettings
from landmark_cli.training.estimate import attention_is_fused, estimate
from landmark_cli.training.fit import STEP_TOKENS, Fit, device_memory, fit, longest_window
from tests.models.families import tiny_decoder

NOTHING_GIVEN = {"sequence_length": None, "batch_size": None, "accumulation": None, "checkpointing": None}


def needs(sequence_length, batch_size, checkpointing):
    return sequence_length * batch_size * (1 if checkpointing else 4)


def fitted(memory, **given):
    return fit(needs, memory, **{"longest": 8192, "shortest": 128} | NOTHING_GIVEN | given)


@pytest.mark.parametrize(
    ("memory", "found"),
    [
        (1e9, Fit(8192, 4, 1, False)),
        (4 * 16384, Fit(8192, 2, 2, False)),
        (4 * 8192, Fit(8192, 1, 4, False)),
        (4 * 8191, Fit(8192, 2, 2, True)),
        (8192, Fit(8192, 1, 4, True)),
        (8191, Fit(4096, 1, 8, True)),
        (128, Fit(128, 1, 256, True)),
        (127, Fit(128, 1, 256, True, fits=False)),
    ],
)
def test_windows_stay_long_as_memory_shrinks(memory, found):
    assert fitted(memory) == found
    assert found.sequence_length * found.batch_size * found.accumulation == STEP_TOKENS


def test_what_is_given_stays_and_the_rest_fits_around_it():
    some = {"sequence_length": (None, 1000), "batch_size": (None, 3), "accumulation": (None, 5)}
    for memory, checkpointing in itertools.product((1, 20_000, 1e9), (None, False, True)):
        for values in itertools.product(*some.values()):
            given = dict(zip(some, values, strict=True)) | {"checkpointing": checkpointing}
            found = fitted(memory, **given)
            for name, value in given.items():
                assert value in (None, getattr(found, name))
            if found.fits:
                assert needs(found.sequence_length, found.batch_size, found.checkpointing) <= memory
    assert fitted(1e9, most=2) == Fit(8192, 2, 2, False)


def test_the_longest_window_is_what_a_model_sees(monkeypatch):
    monkeypatch.setattr("landmark_cli.training.setup.uses_cpu", lambda device: device == "cpu")
    assert longest_window(LlamaConfig(max_position_embeddings=8192), "cuda") == 8192
    assert longest_window(LlamaConfig(max_position_embeddings=8192), "cpu") == 2048
    assert longest_window(LlamaConfig(max_position_embeddings=512), "cpu") == 512
    assert longest_window(LlamaConfig(max_position_embeddings=1 << 17), "cuda") == STEP_TOKENS
    mixed = Qwen2Config(max_position_embeddings=8192, sliding_window=64, use_sliding_window=True, max_window_layers=4)
    assert {"full_attention", "sliding_attention"} == set(mixed.layer_types) and longest_window(mixed, "cuda") == 8192
    assert longest_window(MistralConfig(max_position_embeddings=8192, sliding_window=4096), "cuda") == 4096


def test_processes_share_a_machines_memory_and_a_split_model_is_not_counted(monkeypatch):
    there = SimpleNamespace(total=64 << 30, available=20 << 30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: there)
    # What others hold is not there; in a launch they are its other processes too, and each has its share of all.
    assert device_memory("cpu") == 0.9 * (20 << 30)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device_memory("cpu") == 0.9 * (16 << 30)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert device_memory("cpu") == float("inf")


@pytest.mark.parametrize(
    ("family", "whole"), [("llama", False), ("gemma3", False), ("gemma2", True), ("granite", True), ("cohere2", True)]
)
def test_logits_that_a_head_does_more_to_are_counted_whole(family, whole):
    with torch.device("meta"):
        model, plain = tiny_decoder(family), tiny_decoder("llama")
    how = {"sequence_length": 4096}
    asked, held = (estimate(model, 4, "bf16", fused, **how).memory for fused in (True, False))
    assert (asked == held) == whole
    # A teacher's head counts too.
    beside = [estimate(plain, 4, "bf16", fused, teacher=model, **how).memory for fused in (True, False)]
    assert (beside[0] == beside[1]) == whole


@pytest.mark.parametrize("checkpointing", [False, True])
def test_eager_attention_takes_its_matrices(checkpointing):
    with torch.device("meta"):
        model = tiny_decoder("llama")
    how = {"sequence_length": 4096, "checkpointing": checkpointing}
    fused, eager = (estimate(model, 1, "fp32", fused_attention=kind, **how).memory for kind in (True, False))
    kept = 20 * 4 * 4096**2
    assert eager - fused == pytest.approx(2 * kept if checkpointing else 3 * kept, rel=0.1)


READ = WindowSettings(block_size=5, chunk=10, top_k=2)


@pytest.mark.parametrize(
    ("softmax", "read", "packed", "fused"),
    [("joint", None, False, True), ("joint", None, True, True), ("joint", READ, False, False)]
    + [("grouped", None, False, False), (None, None, False, False)],
)
def test_on_a_cpu_attention_is_fused_where_pytorchs_own_serves(softmax, read, packed, fused):
    with torch.device("meta"):
        model = tiny_decoder("llama", landmark_softmax=softmax, landmark_freq=4 if softmax else None)
    assert attention_is_fused(model, "cpu", read, packed) == fused
