"""A decoding step in fewer kernels gives what the model's modules give, and only where they are known."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.graphs import ChunkForward
from landmark_cli.models import fused_step, row_products, step_kernels, step_operations
from landmark_cli.models.fused_step import Fused, FusedStep, join_weights, rotary_settings, why_not_fused
from landmark_cli.models.joined import Product, join, spanned
from landmark_cli.models.known_layers import FAMILIES
from landmark_cli.models.quantization import quantize
from tests.closeness import assert_close_norm
from tests.inference.test_graphs import Repeated, by_definition
from tests.models.families import FAMILIES as DECODERS
from tests.models.families import tiny_decoder
from tests.models.step_cases import LARGE, SMALL, measure
from tests.models.stepping import KNOWN, compare, landmark_decoder, models, steps, why_not_alike
from tests.tiny import tiny_model, tiny_text

__all__ = ["by_definition"]
KERNEL_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def weights_of(model) -> list[list[nn.Parameter]]:
    return [
        [getattr(owner, name).weight for name in names]
        for layer in model.model.layers
        for owner, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.mlp, ("gate_proj", "up_proj")))
    ]


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
    # Steps, with and without a landmark, and the chunks before them.
    assert {(1, 1), (1, 2)} < set(fused_calls)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close_norm(ours, theirs)


@pytest.mark.parametrize("last_only", [False, True], ids=["all logits", "last logits"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3", "gemma2", "gemma3"])
def test_a_fused_chunk_is_the_models_own(family, last_only, fused_calls, by_definition):
    """Rows of unequal length, padded on the left, in chunks that end within blocks."""
    model, rows, found = landmark_decoder(family), [tiny_text(43, 0), tiny_text(30, 1)], []
    for fused in (False, True):
        reader = BlockReader(model, chunk=10, batch=2)
        reader.forward.fuses_steps = fused
        reader.forward.recording, reader.forward.record = True, Repeated
        assert not fused_calls
        found.append([chunk.logits for chunk in reader.read(rows, last_only=last_only)])
    assert [shape[0] for shape in fused_calls].count(2) >= 3 and min(width for _, width in fused_calls) > 2
    for theirs, ours in zip(*found, strict=True):
        assert_close_norm(ours, theirs)


@pytest.mark.parametrize("family", KNOWN)
def test_a_cap_of_the_heads_logits_is_the_modules_matter(family, by_definition):
    """What a config says of it means something in some families alone."""
    model = landmark_decoder(family)
    model.config.final_logit_softcapping = 0.5
    for a, b in zip(*(steps(model, fused)[0] for fused in (False, True)), strict=True):
        assert_close_norm(a, b)


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
    monkeypatch.setattr(fused_step, "_streams", lambda device: row_products)
    # Weights as small as these, in float32, are left to a library.
    steps(model, True)
    assert not called
    monkeypatch.setattr(row_products, "serves", lambda x, weight: weight is not None and x.numel() <= 2 * x.shape[-1])
    found, _ = steps(model, True)
    assert called[:4] == ["products", "products", "gated_products", "products"]
    for ours, theirs in zip(found, expected, strict=True):
        assert_close_norm(ours, theirs)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_layers_are_fused_too(kind, fused_calls, by_definition):
    model = landmark_decoder(hidden_size=128, intermediate_size=192, initializer_range=0.1)
    quantize(model, kind, model.device)
    expected, found = (steps(model, fused)[0] for fused in (False, True))
    # Steps, with and without a landmark, and the chunks before them.
    assert {(1, 1), (1, 2)} < set(fused_calls)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close_norm(ours, theirs, torch.bfloat16)


def test_the_families_are_those_whose_modules_are_known():
    known = [family for family in DECODERS if why_not_fused(tiny_decoder(family)) is None]
    assert set(KNOWN) < set(known)
    assert {DECODERS[family][0].replace("TextConfig", "Config") for family in known} == {f"{x}Config" for x in FAMILIES}


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
    fused = Fused(model)
    assert fused() is fused() is not None
    change(model, what)
    assert why_not_fused(model) is not None and fused() is None
    join_weights(model)
    assert all(spanned(weights) is None for weights in weights_of(model))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("embedding", "the embedding is a Embedding"),
        ("both ways", "tokens see those behind them"),
        ("rotary", "model.rotary_emb is a"),
        ("longer", "its angles change"),
        ("norm", "pre_feedforward_layernorm is a RMSNorm"),
        ("activation", "act_fn is a SiLU"),
    ],
)
def test_what_is_not_known_of_other_makes_keeps_its_modules(what, words):
    model = landmark_decoder("gemma3")
    assert why_not_fused(model) is None
    if what == "embedding":
        model.set_input_embeddings(nn.Embedding(300, 32))
    elif what == "both ways":
        model.config.use_bidirectional_attention = True
    elif what == "rotary":
        model.model.rotary_emb = landmark_decoder("llama").model.rotary_emb
    elif what == "longer":
        model.model.rotary_emb.rope_type["full_attention"] = "dynamic"
    elif what == "norm":
        model.model.layers[1].pre_feedforward_layernorm = nn.RMSNorm(32)
    elif what == "activation":
        model.model.layers[0].mlp.act_fn = nn.SiLU()
    assert words in why_not_fused(model)


def test_weights_that_moved_are_found_where_they_are():
    model = landmark_decoder()
    fused = Fused(model)
    before = fused()
    join_weights(model)
    assert before.layers[0].qkv.weight is None and fused().layers[0].qkv.weight is not None


def test_a_class_that_somebody_changed_keeps_its_modules(monkeypatch):
    model = landmark_decoder()
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: x)
    assert "MLP" in why_not_fused(model)


def test_it_can_be_turned_off(monkeypatch):
    model = landmark_decoder()
    fused = Fused(model)
    assert fused() is not None
    monkeypatch.setenv("LANDMARK_FUSED_STEPS", "0")
    assert why_not_fused(model) == "LANDMARK_FUSED_STEPS is 0" and fused() is None
    join_weights(model)
    assert all(spanned(weights) is None for weights in weights_of(model))


def test_other_models_keep_their_modules():
    assert (
        why_not_fused(tiny_model())
        == "GPTForCausalLM is none of Llama, Mistral, Ministral, Qwen2, Qwen3, SmolLM3, Gemma2, Gemma3"
    )


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


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_a_kernel_is_as_near_to_float32_as_its_definition(name, dtype, device):
    found = measure(SMALL[name], dtype, device)
    assert found.why_not_alike is None, found.why_not_alike
    if device == "cuda" and name.startswith("rotate_heads") and not name.endswith("normed"):
        # No sum is made in another order, and nothing is rounded less often either.
        assert all(map(torch.equal, *found.outputs))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-llama3", "llama-yarn", "smollm3", "gemma2", "gemma3"])
def test_angles_are_those_of_the_rotary_embedding(family, dtype, device):
    model = landmark_decoder(family).to(device)
    positions = torch.tensor([[0, 1, 2, 700], [60, 4097, 32000, 100000]], device=device)
    for kind in {layer.kind for layer in FusedStep(model).layers}:
        expected = model.model.rotary_emb(torch.empty(1, dtype=dtype, device=device), positions, *filter(None, [kind]))
        given = positions, *rotary_settings(model.model, kind), dtype
        assert all(map(torch.equal, step_operations.angles(*given), expected))
        for ours, theirs in zip(step_kernels.angles(*given), expected, strict=True):
            assert ours.dtype == dtype and ours.shape == theirs.shape
            assert (ours.float() - theirs.float()).abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("rotate_heads")])
def test_a_program_rotates_some_heads_of_a_chunk(name, monkeypatch):
    monkeypatch.setattr(step_kernels, "CHUNK_ROWS", 1)
    found = measure(SMALL[name], torch.float16, "cpu")
    assert found.why_not_alike is None, found.why_not_alike


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_a_kernel_is_so_in_models_shapes(name, dtype):
    found = measure(LARGE[name], dtype, "cuda")
    assert found.why_not_alike is None, found.why_not_alike


def test_a_kernel_leaves_what_lies_beside_its_inputs():
    dim, joined = 24, torch.randn(2, 3, 8 * 24)
    q, k, v = (x.unflatten(-1, (-1, dim)) for x in joined.split([4 * dim, 2 * dim, 2 * dim], -1))
    values, cos = v.clone(), torch.randn(2, 3, dim)
    step_kernels.rotate_heads(q, k, cos, cos)
    assert torch.equal(v, values)
    assert step_kernels.gated(*joined.chunk(2, -1)).is_contiguous()


@pytest.mark.parametrize("chooses", [False, True], ids=["all blocks", "chosen blocks"])
@pytest.mark.parametrize(
    ("device", "family", "kind"),
    [
        ("cpu", "llama", "none"),
        *(
            pytest.param("cuda", family, kind, marks=pytest.mark.gpu)
            for family in KNOWN
            for kind in ("none", "int8", "int4")
        ),
    ],
)
def test_fused_steps_are_as_near_to_float32_as_the_modules(device, family, kind, chooses, fused_calls, request):
    if device == "cpu":
        request.getfixturevalue("by_definition")
    elif kind != "none":
        pytest.importorskip("humming")
    found = models(family, kind, torch.device(device))
    plain, fused = compare(found, chooses)
    assert {(2, 1), (2, 2)} <= set(fused_calls)
    if kind == "none" and device == "cuda":
        assert all(spanned(weights) is not None for weights in weights_of(found.held))
    assert (reason := why_not_alike(plain, fused)) is None, reason


def wrong_operation(monkeypatch, what: str) -> None:
    plain = {name: getattr(step_operations, name) for name in ("add_norm", "rotate_heads", "gated")}
    name, function = {
        "turned the other way": (
            "rotate_heads",
            lambda q, k, cos, sin, *norms: plain["rotate_heads"](q, k, cos, -sin),
        ),
        "a head that is another's": (
            "rotate_heads",
            lambda q, k, *given: plain["rotate_heads"](q.flip(2), k, *given),
        ),
        "a norm without its weight": (
            "add_norm",
            lambda x, added, weight, *given: plain["add_norm"](x, added, torch.ones_like(weight), *given),
        ),
        "a sum that is forgotten": ("add_norm", lambda x, added, *given: (x, plain["add_norm"](x, added, *given)[1])),
        "the gate in the other's place": ("gated", lambda gate, up, *kind: plain["gated"](up, gate, *kind)),
    }[what]
    monkeypatch.setattr(step_operations, name, function)


@pytest.mark.parametrize(
    "what",
    [
        "turned the other way",
        "a head that is another's",
        "a norm without its weight",
        "a sum that is forgotten",
        "the gate in the other's place",
    ],
)
def test_a_wrong_operation_is_not_taken_for_rounding(what, by_definition, monkeypatch):
    wrong_operation(monkeypatch, what)
    assert why_not_alike(*compare(models("llama", "none", torch.device("cpu")), True, count=8)) is not None


def test_rounding_less_often_is_not_taken_for_a_fault(by_definition, monkeypatch):
    """Though other blocks are chosen for it, and the logits of such steps are others."""

    rotate = step_operations.rotate_heads
    monkeypatch.setattr(
        step_operations, "rotate_heads", lambda *given: [x.bfloat16() for x in rotate(*(x.float() for x in given))]
    )
    plain, fused = compare(models("llama-llama3", "none", torch.device("cpu")), True)
    assert why_not_alike(plain, fused) is None and plain != fused and fused.flipped > 0
