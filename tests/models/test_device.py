"""The names of devices: what there is opens, everything else is a usage error that lists it."""

from __future__ import annotations

import pytest
import torch

from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import UsageError
from landmark_cli.models import device
from landmark_cli.models.device import fast_dtype, find_device
from landmark_cli.models.store import load
from tests.tiny import tiny_model

NONSENSE = ["meta", "nowhere", "cpu:1", "cuda:99", "cuda:-1", "cuda:x", "", "mps:7", "xla", "hpu", "vulkan", "0", "[b]"]


@pytest.mark.parametrize("name", NONSENSE)
def test_what_is_no_device_here_is_refused(name):
    with pytest.raises(UsageError, match=r"^--device .*: there is no such device here; there is cpu"):
        find_device(name)


def test_what_there_is_opens(monkeypatch):
    assert find_device("cpu") == torch.device("cpu") and find_device("cpu:0").type == "cpu"
    assert find_device(torch.device("cpu")) == torch.device("cpu")
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert find_device().type == find_device("auto").type == ("cuda" if available else "cpu")


def test_the_gpus_of_a_machine_are_listed(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("cuda:1") == torch.device("cuda:1") and find_device("cuda") == torch.device("cuda")
    with pytest.raises(UsageError, match="there is cpu or cuda:0 or cuda:1$"):
        find_device("cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why there is no GPU")
def test_why_there_is_no_gpu_is_said():
    with pytest.raises(UsageError, match=r"there is cpu \(.*(CUDA|NVIDIA)"):
        find_device("cuda")


def test_a_device_is_refused_before_the_model_is_opened(tmp_path):
    with pytest.raises(UsageError, match="--device meta"):
        load(tmp_path / "no model", device="meta")


PROCESSORS = {
    "an old one": {"avx2": True},
    "AVX-512": {"avx2": True, "avx512_f": True, "avx512_fp16": True},
    "AVX-512 with bfloat16": {"avx512_f": True, "avx512_bf16": True},
    "AMX": {"avx512_bf16": True, "amx_bf16": True},
    "AMX with float16": {"avx512_bf16": True, "amx_bf16": True, "amx_fp16": True},
    "Arm": {"neon": True, "fp16_arith": True},
}
KEEPS = {
    torch.bfloat16: {"AVX-512 with bfloat16", "AMX", "AMX with float16"},
    torch.float16: {"AMX with float16"},
    torch.float32: set(PROCESSORS),
    torch.float64: set(PROCESSORS),
}


@pytest.mark.parametrize("dtype", KEEPS, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_cpu_computes_in_what_it_is_fast_with(name, dtype, monkeypatch):
    monkeypatch.setattr(device, "_capabilities", lambda: PROCESSORS[name])
    expected = dtype if name in KEEPS[dtype] else torch.float32
    assert fast_dtype(dtype, torch.device("cpu")) == expected
    assert fast_dtype(dtype, torch.device("cuda:1")) == fast_dtype(dtype, torch.device("mps")) == dtype


def test_what_this_processor_can_is_known():
    assert all(isinstance(device._capabilities()[name], bool) for name in ("avx512_bf16", "amx_fp16"))


@pytest.mark.parametrize("name", ["an old one", "AMX"])
def test_a_model_opens_in_what_its_device_is_fast_with(name, monkeypatch, tmp_path, capsys):
    """Unless a dtype is asked for; the weights are the stored ones either way."""
    model = tiny_model(vocab_size=50304, landmark_token_id=50260, eos_token_id=50256).bfloat16()
    model.save_pretrained(tmp_path)
    load_tokenizer("gpt2").save_pretrained(tmp_path)
    monkeypatch.setattr(device, "_capabilities", lambda: PROCESSORS[name])
    slow = name == "an old one"
    opened, _ = load(tmp_path, device="cpu")
    assert opened.dtype == (torch.float32 if slow else torch.bfloat16)
    assert ("bfloat16 become float32" in capsys.readouterr().err) == slow
    for found, stored in zip(opened.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, stored.to(opened.dtype))
    assert load(tmp_path, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16
    assert "become" not in capsys.readouterr().err
