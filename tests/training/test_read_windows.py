"""The loss of a training step on windows that are read chunk by chunk, against a reader's loss on the same text."""

from typing import get_args

import pytest
import torch

from landmark_cli.attention import retrieval_window
from landmark_cli.attention.cache import Selection
from landmark_cli.attention.kernels.reading import window as kernels
from landmark_cli.attention.window import ReadingWindow, WindowSettings
from landmark_cli.data.landmarks import IGNORED_TARGET, insert_landmarks, next_token_targets
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.models.rotary import inverse_frequencies
from landmark_cli.training.setup import LossModel, checkpoint_activations
from tests.closeness import assert_close_norm
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.tiny import tiny_model, tiny_text

SIZE = 5


def gpt():
    return tiny_model(n_layer=3, trained_length=60), 39


def llama():
    model = tiny_decoder("llama")
    add_landmarks(model, tiny_tokenizer(), landmark_freq=SIZE - 1, trained_length=60)
    return model.eval(), model.config.landmark_token_id


MODELS = {"gpt": gpt, "llama": llama}


def logits_of_reader(model, text, read):
    """(n, vocabulary): what a reader of one row gives."""
    reader = BlockReader(
        model, top_k_blocks=read.top_k, chunk=read.chunk // SIZE * (SIZE - 1), selection=read.selection
    )
    with torch.no_grad():
        return torch.cat([part.row(0) for part in reader.read([text])])


def losses_of_reader(model, text, read):
    """The summed negative log-likelihood of every token but the first."""
    logits = logits_of_reader(model, text, read)
    return torch.nn.functional.cross_entropy(logits[:-1], text[1:], reduction="sum")


def streams(texts, landmark, padded_to=None):
    """input_ids and labels of texts, each of its own length, padded on the right with targets of none."""
    rows = [insert_landmarks(text, SIZE - 1, landmark) for text in texts]
    width = padded_to or max(map(len, rows))
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), IGNORED_TARGET)
    for row, stream in enumerate(rows):
        ids[row, : len(stream)] = stream
        labels[row, : len(stream)] = next_token_targets(stream, landmark_token_id=landmark, eot_id=None)
    return ids, labels


# Text tokens: of one chunk, of a part of one, of whole ones, of many.
@pytest.mark.parametrize("length", [7, 8, 16, 61, 250], ids=lambda n: f"{n}tokens")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_the_loss_of_a_reader(name, dtype, length):
    model, landmark = MODELS[name]()
    model.to(dtype)
    read = WindowSettings(2 * SIZE, SIZE, 3)
    text = tiny_text(length)
    ids, labels = streams([text], landmark)
    loss = LossModel(model, read=read).eval()(ids, labels)
    # transformers works a loss out in float32, whatever the logits are.
    assert_close_norm(loss, losses_of_reader(model, text, read).to(loss.dtype), torch.float32)
    window = ReadingWindow.make(read, *ids.shape, inverse_frequencies(model))
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=window.position_ids, landmark_window=window, use_cache=False).logits
    assert_close_norm(logits[0, ids[0] != landmark], logits_of_reader(model, text, read))


@pytest.mark.parametrize("fused_loss", [False, True], ids=["logits", "pieces"])
@pytest.mark.parametrize("selection", get_args(Selection))
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_and_a_packed_one_have_the_losses_of_a_reader(name, selection, fused_loss):
    model, landmark = MODELS[name]()
    read = WindowSettings(2 * SIZE, SIZE, 2, selection)
    texts = [tiny_text(length, seed=length) for length in (43, 96, 5)]
    expected = sum(losses_of_reader(model, text, read) for text in texts)
    step = LossModel(model, fused_loss=fused_loss, read=read).eval()
    if selection != "max_over_tokens":
        # What is filled up behind a text is in its last chunk, and there would have a say in what all tokens choose.
        assert_close_norm(step(*streams(texts, landmark)), expected)
    # The same texts as documents of two rows, the second filled up.
    rows = [streams([text], landmark) for text in texts]
    width = max(len(rows[1][0][0]), len(rows[0][0][0]) + len(rows[2][0][0])) + 3
    ids, labels = torch.zeros(2, width, dtype=torch.long), torch.full((2, width), IGNORED_TARGET)
    bounds = [0]
    for row, numbers in ((0, [0, 2]), (1, [1])):
        column = 0
        for number in numbers:
            stream, targets = (x[0] for x in rows[number])
            ids[row, column : column + len(stream)], labels[row, column : column + len(stream)] = stream, targets
            column += len(stream)
            bounds.append(row * width + column)
        bounds.append((row + 1) * width)
    bounds = torch.tensor([*bounds, 2 * width], dtype=torch.int32)
    assert_close_norm(step(ids, labels, cu_seqlens=bounds), expected)


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_moves_nothing(name):
    model, landmark = MODELS[name]()
    read = WindowSettings(2 * SIZE, SIZE, 2)
    stream = insert_landmarks(tiny_text(70), SIZE - 1, landmark)
    start = torch.tensor([0, 6])
    ids = torch.zeros(2, len(stream) + 6, dtype=torch.long)
    ids[0, : len(stream)], ids[1, 6:] = stream, stream
    window = ReadingWindow.make(read, *ids.shape, inverse_frequencies(model), start=start)
    mask = (torch.arange(ids.shape[1]) >= start[:, None]).long()
    inputs = {"position_ids": window.position_ids, "landmark_window": window, "use_cache": False}
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, **inputs).logits
    assert_close_norm(logits[1, 6:], logits[0, : len(stream)])


@pytest.mark.parametrize("name", MODELS)
def test_one_chunk_and_all_blocks_are_a_window_seen_as_a_whole(name):
    model, landmark = MODELS[name]()
    batch = streams([tiny_text(43), tiny_text(29)], landmark)
    whole = LossModel(model).eval()(*batch)
    read = LossModel(model, read=WindowSettings(12 * SIZE, SIZE, 50)).eval()(*batch)
    assert_close_norm(read, whole)


@pytest.mark.parametrize("name", MODELS)
def test_documents_that_do_not_see_each_other_in_windows_seen_as_a_whole(name):
    model, landmark = MODELS[name]()
    texts = [tiny_text(length, seed=length) for length in (13, 24, 31)]
    step = LossModel(model).eval()
    expected = sum(step(*streams([text], landmark)) for text in texts)
    rows = [streams([text], landmark) for text in texts]
    first, second = [torch.cat([rows[0][part], rows[1][part]], 1) for part in (0, 1)], rows[2]
    width = first[0].shape[1]
    ids, labels = (
        torch.cat([a, torch.nn.functional.pad(b, (0, width - b.shape[1]), value=filling)])
        for a, b, filling in zip(first, second, (0, IGNORED_TARGET), strict=True)
    )
    edges = [0, rows[0][0].shape[1], width, width + second[0].shape[1], 2 * width]
    assert_close_norm(step(ids, labels, cu_seqlens=torch.tensor(edges)), expected)
    assert (step(ids, labels) - expected).abs() > 1e-3 * expected


def gradients(model, batch, **settings):
    step = LossModel(model, read=WindowSettings(2 * SIZE, SIZE, 2), **settings).train()
    model.zero_grad()
    torch.manual_seed(0)
    step(*batch).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_and_the_loss_in_pieces_change_no_gradient(name):
    model, landmark = MODELS[name]()
    batch = streams([tiny_text(61), tiny_text(40)], landmark)
    expected = gradients(model, batch)
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    checkpoint_activations(model)
    assert_close_norm(gradients(model, batch, fused_loss=True), expected)


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
def test_layers_that_keep_what_was_retrieved_do_not_retrieve_again(monkeypatch, forwards_of):
    monkeypatch.setenv("LANDMARK_ATTENTION", "triton")
    calls = forwards_of(kernels)
    model, landmark = llama()
    batch, layers = streams([tiny_text(14)], landmark), model.config.num_hidden_layers
    found = []
    for keep in (None, False, True):
        if keep is not None:
            checkpoint_activations(model, keep)
        calls.clear()
        found.append(gradients(model, batch))
        assert len(calls) == layers * (2 if keep is False else 1)
    assert all(torch.equal(each[name], found[0][name]) for each in found for name in found[0])


def test_exploring_draws_other_blocks_in_every_step_and_none_in_evaluation(monkeypatch):
    model, landmark = gpt()
    batch = streams([tiny_text(250)], landmark)
    plain = LossModel(model, read=WindowSettings(2 * SIZE, SIZE, 2)).eval()
    explored = LossModel(model, read=WindowSettings(2 * SIZE, SIZE, 2, explore=1.0))
    assert torch.equal(explored.eval()(*batch), plain(*batch))
    seeds, explore = [], retrieval_window._explore

    def spied(best, earlier, window, layer, *rest):
        seeds.append((layer, int(window.seed_of(layer))))
        return explore(best, earlier, window, layer, *rest)

    monkeypatch.setattr(retrieval_window, "_explore", spied)
    explored.train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(explored(*batch).item())
    assert losses[0] == losses[1] != losses[2] and plain(*batch).item() not in losses
    assert len(set(seeds)) == 2 * model.config.n_layer


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["all kept", "checkpointed", "retrieved kept"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_compiled_step_is_the_same(backend, checkpointing, monkeypatch):
    monkeypatch.setenv("LANDMARK_ATTENTION", backend)
    model = tiny_model(n_layer=2, n_embd=32, trained_length=60)
    ids, labels = streams([tiny_text(27), tiny_text(20)], 39)
    width = ids.shape[1]
    steps = [(ids, labels, torch.tensor([0, first, width, width + 9, 2 * width])) for first in (11, 3)]

    def gradients_of(step, batch):
        model.zero_grad()
        torch.manual_seed(0)
        step(batch[0], batch[1], cu_seqlens=batch[2]).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    step = LossModel(model, fused_loss=True, read=WindowSettings(2 * SIZE, SIZE, 2, explore=0.5)).train()
    expected = [gradients_of(step, batch) for batch in steps]
    assert any((a != b).any() for a, b in zip(*(e.values() for e in expected), strict=True))
    if checkpointing is not None:
        checkpoint_activations(model, checkpointing)
    torch._dynamo.reset()
    # The definition asks tensors for numbers: a compiled model calls it as it is. With kernels it is one graph.
    compiled = torch.compile(step, backend="aot_eager", dynamic=False, fullgraph=backend == "triton")
    for number, batch in enumerate(steps):
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            assert_close_norm(gradients_of(compiled, batch), expected[number])
