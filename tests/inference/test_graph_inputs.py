"""What a recorded chunk reads comes to its memory in one copy, whatever the host does next."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.graph_inputs import STAGES, GraphInputs
from tests.tiny import tiny_model, tiny_text


def given(run: int, rows: int = 3, width: int = 2) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Token ids, positions kept and counts of the run of this number."""
    ids = run * 1000 + torch.arange(rows * width).view(rows, width)
    return ids, torch.tensor([0, 1]) + run, [[10 * run + each + row for row in range(rows)] for each in range(4)]


def held(inputs: GraphInputs) -> tuple:
    return inputs.ids.tolist(), inputs.kept.tolist(), inputs.counters.tolist()


def of_run(run: int) -> tuple:
    ids, kept, counts = given(run)
    return ids.tolist(), kept.tolist(), counts


class Copies(TorchDispatchMode):
    """How often tensors of this memory are copied to."""

    def __init__(self, memory: torch.Tensor):
        super().__init__()
        self.memory, self.count = memory.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.count += args[0].untyped_storage().data_ptr() == self.memory
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_copy_brings_all_that_a_run_reads(device):
    inputs = GraphInputs(3, 2, 2, torch.device(device))
    assert not any(part.any() for part in (inputs.ids, inputs.kept, inputs.counters))
    with Copies(inputs.ids) as copies:
        for run in range(2 * STAGES + 1):
            inputs.write(*given(run))
            assert held(inputs) == of_run(run)
    assert copies.count == 2 * STAGES + 1
    assert (inputs.counters.dtype, inputs.ids.dtype, inputs.kept.dtype) == (torch.int32, torch.int64, torch.int64)
    assert inputs.counters.data_ptr() == inputs.ids.untyped_storage().data_ptr()


@pytest.mark.gpu
def test_what_a_gpu_has_not_read_yet_is_not_written_over():
    inputs, found = GraphInputs(3, 2, 2, torch.device("cuda")), []
    for run in range(4 * STAGES):
        # The copy waits behind this, and the host does not.
        torch.cuda._sleep(20_000_000)
        inputs.write(*given(run))
        found.append((inputs.ids.clone(), inputs.kept.clone(), inputs.counters.clone()))
    assert [tuple(part.tolist() for part in parts) for parts in found] == [of_run(run) for run in range(4 * STAGES)]


@pytest.fixture
def asked(monkeypatch):
    """How often layers have been asked for room."""
    from landmark_cli.attention.cache.blocks import LayerBlocks

    found, reserve = [], LayerBlocks.reserve
    monkeypatch.setattr(LayerBlocks, "reserve", lambda self, *given: found.append(self) or reserve(self, *given))
    return found


def test_room_is_asked_for_when_a_step_touches_other_blocks(asked):
    reader = BlockReader(tiny_model(), batch=2, chunk=8)
    list(reader.read([tiny_text(10, 1), tiny_text(13, 2)]))
    cache, lengths = reader.cache, [1, 1]
    blocks = len(cache.layers)
    for tokens in range(2 * cache.settings.block_size):
        before = list(asked)
        cache.reserve(lengths)
        touched = tokens == 0 or any(tail in (0, cache.settings.block_size - 1) for tail in cache.host_tail)
        assert len(asked) - len(before) == blocks * touched, cache.host_tail
        cache.advance(lengths)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.forget(1),
        lambda cache: cache.take([1, 0]),
        lambda cache: cache.put(1, cache.copy_of(0), cache.host_blocks[0], cache.host_tail[0]),
        lambda cache: cache.layer(0, torch.zeros(2, 2, 1, 8), cache.begin_chunk([1, 1])),
        lambda cache: cache.reserve([9, 0]),
    ],
    ids=["forget", "take", "put", "another layer", "another chunk"],
)
def test_room_is_asked_for_again_once_layers_may_have_changed(change, asked):
    reader = BlockReader(tiny_model(), batch=2, chunk=8)
    list(reader.read([tiny_text(10, 1), tiny_text(10, 2)]))
    cache = reader.cache
    cache.reserve([1, 1])
    asked.clear()
    cache.reserve([1, 1])
    assert not asked
    change(cache)
    cache.host_blocks, cache.host_tail = [2, 2], [2, 2]
    asked.clear()
    cache.reserve([1, 1])
    assert len(asked) == len(cache.layers)
