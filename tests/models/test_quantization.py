"""Weights in 8 and 4 bits: codes, products of them, and models that hold theirs so."""

import copy
import sys

import pytest
import torch
from torch import nn

import landmark_cli
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.models import quantization, quantized_products
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.models.gpt import GPTForCausalLM
from landmark_cli.models.lora import LoraSettings, add_adapters
from landmark_cli.models.quantization import GROUP, QuantizedLinear, encode, quantize, weight_count, weights_by_name
from landmark_cli.models.quantized_products import FEW_ROWS, packed
from tests.closeness import assert_close_norm, whole_error
from tests.tiny import tiny_llama, tiny_model, tiny_text

CPU = torch.device("cpu")
KINDS = ("int8", "int4")
WIDE = {"n_embd": 64, "n_head": 2, "vocab_size": 96, "initializer_range": 0.1}


def random_weight(rows: int = 80, columns: int = 2 * GROUP, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def quantized(kind: str, **settings) -> GPTForCausalLM:
    model = tiny_model(**WIDE, **settings)
    quantize(model, kind, CPU)
    return model


@pytest.mark.parametrize("bits, most", [(8, 0.008), (4, 0.1)])
def test_codes_stand_for_the_weight(bits, most):
    weight = random_weight()
    weight[3], weight[5, :GROUP] = 0, 0
    codes = encode(weight, bits)
    assert codes.codes.dtype == torch.int8 and codes.codes.shape == weight.shape
    assert codes.scales.shape == (80, 1 if bits == 8 else 2) and codes.scales.dtype == torch.bfloat16
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    assert low <= codes.codes.min() and codes.codes.max() <= high
    found = codes.weight()
    assert torch.equal(found[3], weight[3]) and torch.equal(found[5, :GROUP], weight[5, :GROUP])
    assert whole_error(found, weight) <= most


def test_no_weight_of_8_bits_is_further_off_than_half_a_step():
    weight = random_weight()
    codes = encode(weight, 8)
    # The scale is rounded, by which the largest may be cut off.
    assert ((codes.weight() - weight).abs() <= codes.scales.float() * 0.5 * 1.6).all()


def test_a_scale_of_4_bits_is_the_better_of_two():
    weight = random_weight()
    groups = weight.view(80, -1, GROUP)
    largest = (groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8).bfloat16().float()
    plain = ((groups / largest).round().clamp(-8, 7) * largest - groups).square().sum(-1)
    found = (encode(weight, 4).weight().view_as(groups) - groups).square().sum(-1)
    assert (found <= plain).all() and found.sum() < 0.95 * plain.sum()


def test_rows_are_encoded_by_themselves_whatever_is_worked_on_at_a_time(monkeypatch):
    whole = [encode(random_weight(), bits) for bits in (8, 4)]
    monkeypatch.setattr(quantization, "AT_A_TIME", 7 * 2 * GROUP)
    for codes in whole:
        again = encode(random_weight(), codes.bits)
        assert torch.equal(codes.codes, again.codes) and torch.equal(codes.scales, again.scales)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1])
def test_a_product_is_that_with_the_weight_of_the_codes(rows, bits, dtype, bias):
    linear = nn.Linear(2 * GROUP, 80, bias=bias).to(dtype)
    layer = QuantizedLinear(linear, bits, CPU)
    x = torch.randn(2, rows, 2 * GROUP).to(dtype)
    expected = x.double() @ encode(linear.weight.detach(), bits).weight(torch.float64).T
    expected += linear.bias.detach().double() if bias else 0
    found = layer(x)
    assert found.dtype == dtype and found.shape == (2, rows, 80)
    # Of few rows the activations and what comes out are rounded to bfloat16.
    assert whole_error(found, expected) <= 2**-8


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_codes_are_counted_from_0_and_lie_lowest_first(bits):
    codes = encode(random_weight(), bits)
    words, each = packed(codes), 32 // bits
    assert words.dtype == torch.int32 and words.shape == (80, 2 * GROUP // each)
    unpacked = torch.stack([words >> bits * place & (1 << bits) - 1 for place in range(each)], -1).flatten(1)
    assert torch.equal(unpacked - (1 << bits - 1), codes.codes.to(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_models_linear_layers_are_quantized_and_it_reads_as_before(kind):
    plain, model = tiny_model(**WIDE), quantized(kind)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert layers.keys() == {path for path, layer in plain.named_modules() if isinstance(layer, nn.Linear)}
    # The head is tied to the embedding, which stays; it has 8 bits in either case.
    assert layers["lm_head"].bits == 8 and torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert {layer.bits for path, layer in layers.items() if path != "lm_head"} == {8 if kind == "int8" else 4}
    assert weight_count(model) == weight_count(plain) + plain.lm_head.weight.numel()
    rows, found = [tiny_text(60)], []
    for one in (plain, model):
        reader = BlockReader(one, chunk=16, top_k_blocks=2)
        read = torch.cat([chunk.row(0) for chunk in reader.read(rows)])
        found.append(torch.cat([read, reader.step([3])]))
    error = whole_error(found[1], found[0])
    assert 0 < error < (0.02 if kind == "int8" else 0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_of_transformers_is_quantized(kind):
    model = tiny_llama(hidden_size=64, intermediate_size=128, num_attention_heads=1, initializer_range=0.1)
    x = tiny_text(12)[None]
    before = model(x).logits
    quantize(model, kind, CPU)
    # A vocabulary of 40 is too narrow, so the head stays.
    assert isinstance(model.lm_head, nn.Linear) and isinstance(model.model.layers[0].mlp.down_proj, QuantizedLinear)
    with torch.no_grad():
        assert whole_error(model(x).logits, before) < (0.05 if kind == "int8" else 0.5)


@pytest.fixture
def products(monkeypatch) -> list[tuple]:
    """The shapes of what is multiplied."""
    found, plain = [], quantized_products.CpuProduct.forward

    def forward(self, rows):
        y = plain(self, rows)
        found.append((rows.shape[0], y.shape[1]))
        return y

    monkeypatch.setattr(quantized_products.CpuProduct, "forward", forward)
    return found


WIDE_LLAMA = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "initializer_range": 0.1}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_the_same_input_are_one_product(kind, products, monkeypatch):
    """Of known decoders, with the codes that each layer has by itself; whoever calls a layer gets its own output."""
    model, x = tiny_llama(**WIDE_LLAMA), tiny_text(5)[None]
    alone = copy.deepcopy(model)
    quantize(model, kind, CPU)
    with monkeypatch.context() as patch:
        patch.setenv("LANDMARK_FUSED_STEPS", "0")
        quantize(alone, kind, CPU)
    with torch.no_grad():
        found = model(x).logits
        assert products == [(5, 128 + 64 + 64), (5, 128), (5, 2 * 192), (5, 128)]
        products.clear()
        assert_close_norm(found, alone(x).logits, torch.bfloat16)
        assert [width for _, width in products] == [128, 64, 64, 128, 192, 192, 128]
    assert weights_by_name(model) == weights_by_name(alone) and weight_count(model) == weight_count(alone)
    names = [name for name, _ in model.named_parameters()]
    assert not any(".product." in name for name in names)


@torch.no_grad()
def test_a_part_is_never_that_of_another_input(products):
    model = tiny_llama(**WIDE_LLAMA)
    quantize(model, "int8", CPU)
    attention = model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    x, other = torch.randn(2, 1, 1, 128)
    expected = [[layer(one.clone()) for layer in layers] for one in (x, other, -x)]

    def check(one: torch.Tensor, of: list[torch.Tensor], order: tuple[int, ...], count: int) -> None:
        products.clear()
        for place in order:
            assert torch.equal(layers[place](one), of[place])
        assert len(products) == count

    check(x, expected[0], (0, 1, 2), 1)
    check(x, expected[0], (2, 1, 0, 0), 2)
    check(other, expected[1], (0, 1), 1)
    check(x, expected[0], (2,), 1)
    assert torch.equal(layers[0](x), expected[0][0])
    x.neg_()
    check(x, expected[2], (1, 2), 1)
    with torch.inference_mode():
        check(x.clone(), expected[2], (0, 1, 2), 3)
    again = copy.deepcopy(attention)
    assert torch.equal(again.k_proj(x), expected[2][1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(n_embd=64, n_layer=1, vocab_size=50304, landmark_token_id=50260, eos_token_id=50256).save_pretrained(
        folder
    )
    load_tokenizer("gpt2").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_opens_quantized_and_generates(saved, kind):
    model, tokenizer = landmark_cli.load(saved, device="cpu", quantization=kind)
    assert quantization.quantization_of(model) == kind and not model.training
    sampling = landmark_cli.SamplingSettings(max_new_tokens=5, temperature=0)
    (answer,) = landmark_cli.generate(model, tokenizer, ["It is a truth universally acknowledged"], sampling)
    assert len(answer.tokens) == 5


def test_memories_tell_how_weights_are_held(saved, tmp_path):
    opened = {kind: landmark_cli.load(saved, device="cpu", quantization=kind)[0] for kind in ("none", *KINDS)}
    for kind, model in opened.items():
        reader = BlockReader(model, top_k_blocks=2, chunk=8)
        list(reader.read([tiny_text(30)]))
        reader.save(tmp_path / kind)
    for kind, model in opened.items():
        reader = BlockReader(model, top_k_blocks=2, chunk=8)
        reader.recall(tmp_path / kind)
        for other in opened.keys() - {kind}:
            with pytest.raises(UsageError, match=f"--quantization {other}, and .* {kind}: give --quantization {other}"):
                reader.recall(tmp_path / other)


def test_a_quantized_weight_is_known_by_what_it_was_made_of(saved):
    model, again = (landmark_cli.load(saved, device="cpu", quantization="int4")[0] for _ in range(2))
    named = weights_by_name(model)
    assert named == weights_by_name(again)
    plain = weights_by_name(landmark_cli.load(saved, device="cpu")[0])
    assert plain.items() <= named.items() and named.keys() - plain.keys() == {"lm_head.weight"}


def train(model):
    model.train()


def save(model):
    model.state_dict()


def gradient(model):
    x = torch.zeros(1, 64, requires_grad=True)
    model.model.layers[0].mlp.up_proj(x)


REFUSED = {
    "trained": (train, "weights in int8 cannot be trained: open the model without quantization"),
    "saved": (save, "weights in int8 are not saved"),
    "gradient": (gradient, "weights in int8 have no gradients"),
    "adapters": (lambda model: add_adapters(model, LoraSettings(2, 4)), "weights in int8 cannot be given adapters"),
    "landmarks": (lambda model: add_landmarks(model, None), "weights in int8 cannot be given landmarks"),
    "again": (lambda model: quantize(model, "int4", CPU), "quantized already: open it without --quantization"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_quantized_model_cannot_do_is_refused_in_a_line(what):
    act, said = REFUSED[what]
    with pytest.raises(LandmarkError, match=said):
        act(quantized("int8"))


def test_copies_of_a_quantized_model_give_the_same():
    model, x = quantized("int4"), tiny_text(9)[None]
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x).logits, model(x).logits)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"quantization": "int3"}, "expected one of none, int8, int4; found 'int3'"),
        ({"quantization": "int8", "device": "meta"}, "there is no such device"),
    ],
)
def test_what_load_does_not_know(saved, settings, said):
    with pytest.raises(UsageError, match=said):
        landmark_cli.load(saved, **{"device": "cpu", **settings})


def test_devices_and_dtypes_without_products_are_named(monkeypatch):
    check = quantization.check_quantization
    with pytest.raises(UsageError, match="products for cpu and cuda, and none for mps"):
        check("int8", "auto", torch.device("mps"))
    check("none", "auto", torch.device("mps"))
    monkeypatch.setattr(quantized_products, "import_extra", lambda *names: None)
    for dtype in ("float32", torch.float32):
        with pytest.raises(UsageError, match="in float32: on a GPU the products are in 16 bits; give --dtype bfloat16"):
            check("int4", dtype, torch.device("cuda"))
    check("int4", "auto", torch.device("cuda"))


def test_a_gpu_needs_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "humming", None)
    with pytest.raises(LandmarkError, match=r"needs the package humming.*landmark-cli\[quantization\]"):
        quantization.check_quantization("int8", "auto", torch.device("cuda"))


def test_a_model_too_narrow_is_refused():
    with pytest.raises(LandmarkError, match="has no linear layer that can be held in int4: in_features must be a"):
        quantize(tiny_model(), "int4", CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 100, 2016])
@pytest.mark.parametrize("shape", [(1024, 4096), (576, 1536), (192, 576)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_on_a_gpu_is_that_with_the_weight_of_the_codes(bits, dtype, shape, rows):
    pytest.importorskip("humming")
    device, (out_features, in_features) = torch.device("cuda"), shape
    linear = nn.Linear(in_features, out_features).to(dtype)
    layer = QuantizedLinear(linear, bits, device)
    x = torch.randn(1, rows, in_features, dtype=dtype, device=device)
    weight = encode(linear.weight.detach().to(device), bits, dtype).weight(torch.float64)
    expected = x.double() @ weight.T + linear.bias.detach().to(device).double()
    assert whole_error(layer(x), expected) <= 2**-7
    # The same again as a CUDA graph.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = layer(x)
    x.neg_()
    for _ in range(3):
        graph.replay()
    expected = x.double() @ weight.T + linear.bias.detach().to(device).double()
    assert whole_error(found, expected) <= 2**-7


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_reads_on_a_gpu_as_on_a_cpu(kind):
    pytest.importorskip("humming")
    found = []
    for device in (CPU, torch.device("cuda")):
        model = tiny_model(**WIDE, n_layer=1).to(torch.bfloat16)
        quantize(model, kind, device)
        reader = BlockReader(model.to(device), chunk=16, top_k_blocks=2)
        read = torch.cat([chunk.row(0).float().cpu() for chunk in reader.read([tiny_text(60)])])
        steps = [reader.step([3 + at]).float().cpu().clone() for at in range(5)]
        found.append(torch.cat([read, *steps]))
    assert whole_error(found[1], found[0]) < 0.05
