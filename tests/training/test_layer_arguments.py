"""What layers are handed besides tensors comes to each as it is, also through what FSDP does to a layer's arguments."""

import functools
import inspect
import typing
from collections.abc import Callable

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from landmark_cli.attention import dispatch, recurrent
from landmark_cli.attention.cache import BlockCache, RetrievalSettings
from landmark_cli.attention.dispatch import LandmarkLayout
from landmark_cli.attention.recurrent import RecurrentMemory
from landmark_cli.attention.rotary import default_inverse_frequencies
from landmark_cli.attention.window import ReadingWindow, WindowSettings
from landmark_cli.models import gpt, support
from landmark_cli.models.rotary import inverse_frequencies
from landmark_cli.training.gate import Gate
from landmark_cli.training.setup import LossModel, checkpoint_activations
from tests.tiny import FREQ, tiny_llama, tiny_model

SIZE = FREQ + 1
READ = WindowSettings(2 * SIZE, SIZE, 2)
ENTRANCES = [
    dispatch.landmark_attention_forward,
    recurrent.recurrent_attention_forward,
    support._record,
    gpt.Block.forward,
    gpt.Attention.forward,
]


def block_cache() -> BlockCache:
    settings = RetrievalSettings(block_size=SIZE, top_k=2, positions="absolute")
    return BlockCache(settings, default_inverse_frequencies(8))


MADE = {
    "landmark_cache": block_cache,
    "landmark_chunk": lambda: block_cache().begin_chunk([SIZE]),
    "landmark_layout": lambda: LandmarkLayout(dropout_p=0.5, controlled=torch.rand(1, 8)),
    "landmark_window": lambda: ReadingWindow.make(READ, 1, 40, default_inverse_frequencies(8)),
    "landmark_observer": lambda: Gate(None, [0]).ask,
    "landmark_probe": lambda: support._Seen(torch.rand(4)),
    "recurrent_memory": lambda: RecurrentMemory(4),
    "rotation": lambda: gpt.Rotation(*torch.rand(2, 1, 1, 8, 4)),
}


def ours(hint) -> bool:
    """Whether an annotation names a class of this package, or what is called back."""
    if typing.get_origin(hint) is Callable:
        return True
    return getattr(hint, "__module__", "").startswith("landmark_cli") or any(map(ours, typing.get_args(hint)))


@pytest.fixture(scope="module")
def shard():
    """`fully_shard` in bf16, over a single process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    yield functools.partial(fully_shard, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    distributed.destroy_process_group()


class Layer(nn.Linear):
    def forward(self, x, given):
        self.was_given = given
        return super().forward(x)


def test_every_argument_of_ours_is_made_here():
    named = set()
    for entrance in ENTRANCES:
        hints = typing.get_type_hints(inspect.unwrap(entrance), vars(inspect.getmodule(entrance)))
        named |= {name for name, hint in hints.items() if name != "return" and ours(hint)}
    assert named == MADE.keys()


@pytest.mark.parametrize("name", MADE)
def test_it_is_the_same_object_in_a_sharded_layer(name, shard):
    layer, given = shard(Layer(4, 4)), MADE[name]()
    layer(torch.rand(1, 4), given=given)
    assert layer.was_given is given
    layer(torch.rand(1, 4), given)
    assert layer.was_given is given


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_windows_that_are_read_have_float32_tables_in_every_layer(name, again, shard, monkeypatch):
    model = tiny_model() if name == "gpt" else tiny_llama()
    if name == "llama":
        model.config.landmark_freq = FREQ
        model.set_attn_implementation("landmark")
    frequencies = inverse_frequencies(model)
    if again:
        checkpoint_activations(model)
    for layer in model.base_model.layers:
        shard(layer)
    windows, tables = [], []
    attend, rotate = dispatch.attend_window, gpt.split_and_rotate

    def attended(layer, q, k, v, window, **more):
        assert q.dtype == torch.bfloat16
        windows.append(window)
        return attend(layer, q, k, v, window, **more)

    monkeypatch.setattr(dispatch, "attend_window", attended)
    monkeypatch.setattr(gpt, "split_and_rotate", lambda x, *table: tables.extend(table) or rotate(x, *table))
    ids = torch.randint(30, (2, 37))
    LossModel(shard(model), read=READ).train()(ids, ids).backward()
    assert len(windows) == 2 * (1 + again) and all(window is windows[0] for window in windows)
    expected = ReadingWindow.make(READ, *ids.shape, frequencies)
    assert torch.equal(windows[0].cos, expected.cos) and torch.equal(windows[0].sin, expected.sin)
    assert windows[0].cos.dtype == torch.float32 and all(table.dtype == torch.float32 for table in tables)
    assert len(tables) == (2 * len(windows) if name == "gpt" else 0)
