"""A decoding step in fewer kernels gives what the model's modules give, and only where they are known."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.graphs import ChunkForward
from landmark_cli.models import row_products, step_kernels, step_operations
from landmark_cli.models.fused_step import FusedStep, join_weights, why_not_fused
from landmark_cli.models.joined import Product, join, spanned
from landmark_cli.models.known_layers import FAMILIES
from landmark_cli.models.layers import settle_layers
from landmark_cli.models.quantization import quantize
from tests.closeness import assert_close_norm
from tests.inference.test_graphs import Repeated, by_definition
from tests.models.families import FAMILIES as DECODERS
from tests.models.families import tiny_decoder
from tests.tiny import tiny_model, tiny_text

KNOWN = ["llama", "llama-tied", "llama-llama3", "mistral", "mistral-wide-window", "qwen2", "qwen3"]
LANDMARKS = {"landmark_freq": 4, "landmark_token_id": 299, "trained_length": 40, "top_k_blocks": 2}
__all__ = ["by_definition"]
KERNEL_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def landmark_decoder(family: str = "llama", **settings):
    model = tiny_decoder(family, **settings)
    for name, value in LANDMARKS.items():
        setattr(model.config, name, value)
    model.set_attn_implementation("landmark")
    settle_layers(model)
    return model


def weights_of(model) -> list[list[nn.Parameter]]:
    return [
        [getattr(owner, name).weight for name in names]
        for layer in model.model.layers
        for owner, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.mlp, ("gate_proj", "up_proj")))
    ]


def steps(model, fused: bool, count: int = 7, **options) -> tuple[list[torch.Tensor], BlockReader]:
    """Logits of steps behind a text, as graphs give them, or what stands in for these."""
    reader = BlockReader(model, chunk=8, **options)
    reader.forward.recording, reader.forward.fuses_steps = True, fused
    if model.device.type == "cpu":
        reader.forward.record = Repeated
    list(reader.read([tiny_text(30, row) for row in range(reader.batch)]))
    found = [reader.step([7 + at] * reader.batch) for at in range(count)]
    assert {kind[0] for kind in reader.forward._recorded} >= {1, 2}
    return found, reader


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv("LANDMARK_FUSED_STEPS", "1")


@pytest.fixture
def fused_calls(monkeypatch):
    found, plain = [], FusedStep.__call__

    def call(self, ids, *args, **inputs):
        found.append(ids.shape)
        return plain(self, ids, *args, **inputs)

    monkeypatch.setattr(FusedStep, "__call__", call)
    return found


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("family", KNOWN)
def test_a_fused_step_is_the_models_own(family, joined, fused_calls, by_definition):
    model = landmark_decoder(family)
    expected, _ = steps(model, False)
    assert not fused_calls
    if joined:
        join_weights(model)
    assert all((spanned(weights) is not None) == joined for weights in weights_of(model))
    found, _ = steps(model, True)
    assert set(fused_calls) == {(1, 1), (1, 2)}
    for ours, theirs in zip(found, expected, strict=True):
        assert_close_norm(ours, theirs)


def test_steps_give_the_same_with_a_graph_and_without(fused_calls, by_definition, monkeypatch):
    """Where a text goes on must not depend on when a graph is recorded."""
    model = landmark_decoder()
    expected, _ = steps(model, True)
    monkeypatch.setattr(ChunkForward, "_record", lambda *given: False)
    reader = BlockReader(model, chunk=8)
    reader.forward.recording = True
    list(reader.read([tiny_text(30, 0)]))
    fused_calls.clear()
    assert all(torch.equal(reader.step([7 + at]), logits) for at, logits in enumerate(expected))
    assert len(fused_calls) == len(expected) and not reader.forward._recorded


def test_rows_of_a_batch_are_fused_too(fused_calls, by_definition):
    model = landmark_decoder()
    expected, found = (steps(model, fused, batch=3)[0] for fused in (False, True))
    assert (3, 1) in fused_calls
    for ours, theirs in zip(found, expected, strict=True):
        assert_close_norm(ours, theirs)


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_weights_are_read_as_streams(family, by_definition, monkeypatch):
    model, called = landmark_decoder(family, num_hidden_layers=1), []
    join_weights(model)
    for name in ("products", "gated_products"):
        plain = getattr(row_products, name)
        monkeypatch.setattr(row_products, name, lambda *given, f=plain, n=name: called.append(n) or f(*given))
    expected, _ = steps(model, True)
    assert not called
    monkeypatch.setattr(FusedStep, "streams", True)
    found, _ = steps(model, True)
    assert called[:4] == ["products", "products", "gated_products", "products"]
    for ours, theirs in zip(found, expected, strict=True):
        assert_close_norm(ours, theirs)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_layers_are_fused_too(kind, fused_calls, by_definition):
    model = landmark_decoder(hidden_size=128, intermediate_size=192, initializer_range=0.1)
    quantize(model, kind, model.device)
    expected, found = (steps(model, fused)[0] for fused in (False, True))
    assert set(fused_calls) == {(1, 1), (1, 2)}
    for ours, theirs in zip(found, expected, strict=True):
        assert_close_norm(ours, theirs, torch.bfloat16)


def test_the_families_are_those_whose_modules_are_known():
    known = [family for family in DECODERS if why_not_fused(tiny_decoder(family)) is None]
    assert set(KNOWN) < set(known) and {DECODERS[family][0] for family in known} == {f"{x}Config" for x in FAMILIES}


class Other(nn.Linear):
    """Stands in for an adapter."""


def change(model, what: str) -> None:
    layer = model.model.layers[1]
    if what == "hook":
        layer.mlp.register_forward_hook(lambda *args: None)
    elif what == "hook before":
        layer.self_attn.k_proj.register_forward_pre_hook(lambda *args: None)
    elif what == "forward":
        layer.self_attn.forward = layer.self_attn.forward
    elif what == "adapter":
        layer.mlp.up_proj = Other(32, 48, bias=False)
    elif what == "activation":
        layer.mlp.act_fn = nn.GELU()
    elif what == "norm":
        layer.input_layernorm = nn.RMSNorm(32)
    elif what == "more":
        layer.self_attn.gate = nn.Linear(32, 32)
    elif what == "training":
        model.train()


@pytest.mark.parametrize(
    "what", ["hook", "hook before", "forward", "adapter", "activation", "norm", "more", "training"]
)
def test_what_is_not_known_keeps_its_modules(what):
    model = landmark_decoder()
    assert why_not_fused(model) is None
    change(model, what)
    assert why_not_fused(model) is not None
    join_weights(model)
    assert all(spanned(weights) is None for weights in weights_of(model))


def test_a_class_that_somebody_changed_keeps_its_modules(monkeypatch):
    model = landmark_decoder()
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: x)
    assert "MLP" in why_not_fused(model)


@pytest.mark.parametrize("value", [None, "0"])
def test_it_has_to_be_asked_for(value, monkeypatch):
    monkeypatch.delenv("LANDMARK_FUSED_STEPS")
    if value is not None:
        monkeypatch.setenv("LANDMARK_FUSED_STEPS", value)
    model = landmark_decoder()
    assert why_not_fused(model) == "LANDMARK_FUSED_STEPS is not 1"
    join_weights(model)
    assert all(spanned(weights) is None for weights in weights_of(model))


def test_other_models_keep_their_modules():
    assert why_not_fused(tiny_model()) == "GPTForCausalLM is none of Llama, Mistral, Qwen2, Qwen3"


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2"])
def test_joined_weights_are_the_models_own(family, tmp_path):
    """They are saved, loaded, trained and copied as before."""
    model, x = landmark_decoder(family), tiny_text(12)[None]
    plain, parameters = copy.deepcopy(model), dict(model.named_parameters())
    join_weights(model)
    assert all(spanned(weights) is not None for weights in weights_of(model))
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert torch.equal(model(x).logits, plain(x).logits)
    model.save_pretrained(tmp_path / "joined")
    plain.save_pretrained(tmp_path / "plain")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("joined", "plain"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    # What is loaded is seen by the one product.
    parts = weights_of(model)[0]
    whole = spanned(parts).clone()
    model.load_state_dict({name: tensor * 2 for name, tensor in plain.state_dict().items()})
    assert torch.equal(spanned(parts), 2 * whole)
    model.train()
    for each in (model, plain):
        each.load_state_dict(theirs, strict=False)
        each.zero_grad()
        each(x, labels=x).loss.backward()
        torch.optim.AdamW(each.parameters(), lr=0.1).step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bias", [False, True])
def test_layers_that_are_joined_are_one_product(bias):
    layers, x = [nn.Linear(6, width, bias=bias) for width in (4, 3, 5)], torch.randn(2, 1, 6)
    expected = [layer(x) for layer in layers]
    assert all(map(torch.equal, Product(layers)(x), expected))
    join([layer.weight for layer in layers])
    if bias:
        # The weights alone are not enough.
        assert all(map(torch.equal, Product(layers)(x), expected))
        join([layer.bias for layer in layers])
    calls = []
    for layer in layers:
        layer.register_forward_hook(lambda *args: calls.append(args))
    for found, one in zip(Product(layers)(x), expected, strict=True):
        assert_close_norm(found, one)
    assert not calls


def test_what_is_a_part_of_something_else_is_not_moved():
    whole = torch.randn(9, 6)
    parameters = [nn.Parameter(whole[:4]), nn.Parameter(whole[5:])]
    before = [x.data_ptr() for x in parameters]
    join(parameters)
    assert [x.data_ptr() for x in parameters] == before and spanned(parameters) is None
    assert torch.equal(spanned([nn.Parameter(whole[:4]), nn.Parameter(whole[4:])]), whole)


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Triton's interpreter cuts bfloat16 off where a GPU rounds, as often as a kernel rounds on its way."""
    assert found.dtype == expected.dtype
    cut_off = not found.is_cuda and found.dtype == torch.bfloat16
    assert_close_norm(found, expected, within=0.04 if cut_off else None)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 1024, 2880])
@pytest.mark.parametrize("adds", [False, True])
def test_the_kernel_of_norms_is_the_definition(adds, width, dtype, device):
    x, added = torch.randn(2, 2, 1, width, dtype=torch.float32).to(device, dtype)
    given = x.expand(2, 1, width), added if adds else None, torch.randn(width).to(device, dtype), 1e-6
    for found, expected in zip(step_kernels.add_norm(*given), step_operations.add_norm(*given), strict=True):
        assert_alike(found, expected)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 24, 128])
@pytest.mark.parametrize("normed", [False, True])
def test_the_kernel_of_heads_is_the_definition(normed, dim, dtype, device):
    joined = torch.randn(2, 3, (4 + 2 + 2) * dim).to(device, dtype)
    q, k, v = (x.unflatten(-1, (-1, dim)) for x in joined.split([4 * dim, 2 * dim, 2 * dim], -1))
    angles = torch.rand(2, 3, dim // 2).repeat(1, 1, 2) * 7
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    norms = (*torch.randn(2, dim).to(device, dtype), 1e-6) if normed else ()
    values = v.clone()
    expected = step_operations.rotate_heads(q, k, cos, sin, *norms)
    for found, one in zip(step_kernels.rotate_heads(q, k, cos, sin, *norms), expected, strict=True):
        assert_alike(found, one)
    assert torch.equal(v, values)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 1024, 2880])
def test_the_kernel_of_gates_is_the_definition(width, dtype, device):
    gate, up = torch.randn(2, 1, 2 * width).mul(4).to(device, dtype).chunk(2, -1)
    found = step_kernels.gated(gate, up)
    assert found.is_contiguous()
    assert_alike(found, step_operations.gated(gate, up))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
@pytest.mark.parametrize("family", KNOWN)
def test_a_gpu_replays_fused_steps(family, kind, fused_calls):
    if kind != "none":
        pytest.importorskip("humming")
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 2}
    model = landmark_decoder(family, **(wide | {"num_key_value_heads": 1, "initializer_range": 0.1}))
    model = model.to("cuda", torch.bfloat16)
    if kind != "none":
        quantize(model, kind, model.device)
    # All blocks are retrieved: which ones are must not depend on how something was rounded.
    options = {"batch": 2, "top_k_blocks": 4, "cache_blocks": 4}
    expected, plain = steps(model, False, 40, **options)
    assert not fused_calls and len(plain.forward._recorded) >= 2
    if kind == "none":
        assert all(spanned(weights) is not None for weights in weights_of(model))
    found, _ = steps(model, True, 40, **options)
    assert {(2, 1), (2, 2)} <= set(fused_calls)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close_norm(ours, theirs, within=0.05)
