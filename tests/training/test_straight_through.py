"""The losses' gradient for landmarks that only choose: against a number added to the logits of every block's text."""

import pytest
import torch

from landmark_cli.training import straight_through
from landmark_cli.training.compiled import compile_layers
from landmark_cli.training.setup import checkpoint_activations
from landmark_cli.training.straight_through import block_gradients
from tests.closeness import assert_close_norm
from tests.training.test_distillation import batch_of, pair, some_texts, step
from tests.training.test_gate import FREQ, LANDMARK, blocks_and_documents, random_layers, sampled, some_streams


def by_added_numbers(q, k, v, stream, cu_seqlens, scale, of_output):
    """What attention to the text reads, the loss's gradient for it, and that for a number (B, H, T, M) added to the
    logits of each query with each block, all by autograd. of_output: the loss of what is read."""
    batch, tokens = stream.shape
    of_rows = [blocks_and_documents(stream, row, cu_seqlens) for row in range(batch)]
    blocks, documents = torch.tensor(of_rows).unbind(1)
    heads = q.shape[1] // k.shape[1]
    added = q.new_zeros(batch, q.shape[1], tokens, tokens, requires_grad=True)
    logits = q @ k.repeat_interleave(heads, 1).transpose(-1, -2) * scale
    logits = logits + added.gather(-1, blocks[:, None, None].expand(logits.shape))
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril() & (documents[:, :, None] == documents[:, None])
    seen = seen & (stream != LANDMARK)[:, None]
    # A landmark that is first of all it sees has nothing to read.
    weights = torch.softmax(logits.masked_fill(~seen[:, None], -1e30), -1)
    out = weights @ v.repeat_interleave(heads, 1)
    gradients = torch.autograd.grad(of_output(out), (out, added))
    return out.detach(), *gradients, blocks, documents


@pytest.mark.parametrize("most", [1 << 28, 1], ids=["all rows", "a row"])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "several"])
def test_it_is_that_of_a_number_added_to_the_logits_of_a_blocks_text(documents, most, monkeypatch):
    monkeypatch.setattr(straight_through, "MOST", most)
    stream, cu_seqlens = some_streams(documents)
    answers = torch.rand(stream.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    text, chosen = sampled(stream, cu_seqlens, joint=True, answers=answers & (stream != LANDMARK))
    _, _, q, k = random_layers(stream, text)
    v = torch.randn(k.shape, dtype=k.dtype, generator=torch.Generator().manual_seed(4))
    weights = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(5))
    given = by_added_numbers(q, k, v, stream, cu_seqlens, 0.4, lambda out: (out.tanh() * weights).sum())
    out, d_out, added, blocks, of_document = given
    found = block_gradients(d_out, out, q, k, v, chosen, 0.4)
    wanted, many = torch.zeros_like(found), 0
    for row in range(len(stream)):
        for s in chosen.real[row].nonzero().flatten().tolist():
            place = int(chosen.stream[row, s])
            same = blocks[row][of_document[row] == of_document[row, place]].unique().tolist()
            for block in (block for block in same if block < blocks[row, place]):
                wanted[row, :, s, block], many = added[row, :, place, block], many + 1
    assert many > 40 and (wanted != 0).any()
    torch.testing.assert_close(found, wanted)


def learning(weight, **changes):
    """(the student's loss, how it learns), its landmarks only choosing blocks."""
    loss, _, how = pair(
        block_size=FREQ + 1, gate_weight=0.7, joint=True, answer_weight=2.0, straight_through_weight=weight, **changes
    )
    loss.wrapped.config.landmark_softmax = "joint"
    return loss, how


def gradients_of(loss, how):
    batch = batch_of(some_texts(), how.landmark_token_id, [(0, 3), (1, 20), (1, 24)])
    found, parts = step(loss, [batch], how)
    named = dict(loss.named_parameters())
    gradients = torch.autograd.grad(found, list(named.values()), allow_unused=True)
    return found.detach(), parts, {n: g for n, g in zip(named, gradients, strict=True) if g is not None}


def test_in_a_model_it_changes_gradients_alone_as_much_as_its_weight_says():
    (off, parts, none), (on, with_it, once), (_, _, twice) = (gradients_of(*learning(weight)) for weight in (0, 3, 6))
    assert torch.equal(off, on) and torch.equal(parts, with_it)
    changed = {name for name in none if not torch.equal(none[name], once[name])}
    # Queries and the keys of landmarks, and what these are made of; no value, and nothing behind the last layer.
    last = "layers.1."
    assert any(last + "self_attn.q_proj" in name for name in changed)
    assert any(last + "self_attn.k_proj" in name for name in changed)
    assert not any(last + "self_attn.v_proj" in name or last + "mlp" in name for name in changed)
    # What it hands to earlier layers changes theirs in turn.
    for name in (name for name in changed if last in name and ("q_proj" in name or "k_proj" in name)):
        assert_close_norm(twice[name] - none[name], 2 * (once[name] - none[name]))


@pytest.mark.parametrize("how_read", ["computed again", "compiled"])
def test_computed_again_or_compiled_it_is_the_same(how_read):
    loss, how = learning(3.0)
    _, _, wanted = gradients_of(loss, how)
    other, how = learning(3.0)
    if how_read == "compiled":
        compile_layers(other.wrapped, backend="aot_eager")
    else:
        checkpoint_activations(other.wrapped)
    _, _, found = gradients_of(other, how)
    assert wanted.keys() == found.keys()
    assert_close_norm(list(wanted.values()), list(found.values()))
