"""The names of devices: what there is opens, everything else is a usage error that lists it."""

from __future__ import annotations

import pytest
import torch

from landmark_cli.errors import UsageError
from landmark_cli.models.device import find_device
from landmark_cli.models.store import load

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
