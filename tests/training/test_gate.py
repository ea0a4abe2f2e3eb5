"""The gate's own loss: against whole matrices, where it is nothing, and that it changes nothing where it is off."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from landmark_cli.attention.retrieval import score_bounded
from landmark_cli.attention.rotary import default_inverse_frequencies, rotate
from landmark_cli.attention.window import ReadingWindow, WindowSettings
from landmark_cli.data.landmarks import IGNORED_TARGET, insert_landmarks
from landmark_cli.training import gate as gate_module
from landmark_cli.training.distillation import Distillation
from landmark_cli.training.gate import (
    Gate,
    block_logits,
    block_shares,
    divergence,
    landmark_logits,
    outer_shares,
)
from landmark_cli.training.gate_queries import ANSWERS_SAMPLED, QUESTION, REPEATED_SAMPLED, SAMPLED, TEXT_SAMPLED
from landmark_cli.training.setup import checkpoint_activations
from landmark_cli.training.teachers import Teacher
from tests.closeness import assert_close_norm
from tests.models.families import tiny_decoder
from tests.training.test_distillation import FAMILIES, assert_compiled_it_is_the_same, batch_of, pair, some_texts, step

FREQ, LANDMARK = 4, 999
FIRST = SimpleNamespace(layer_idx=0)


def some_streams(documents=False):
    """(stream (2, T), boundaries of documents or None)."""
    if not documents:
        return insert_landmarks(some_texts(2, 38), FREQ, LANDMARK), None
    rows = [[some_texts(1, length, seed=length) for length in lengths] for lengths in ((13, 25), (30, 3, 5))]
    streams = [[insert_landmarks(text, FREQ, LANDMARK)[0] for text in row] for row in rows]
    ends = torch.tensor([len(stream) for row in streams for stream in row]).cumsum(0)
    width = max(sum(map(len, row)) for row in streams)
    # What fills up the shorter row is a document more.
    padded, ends = [], []
    for row in streams:
        stream = torch.cat(row)
        missing = width - len(stream)
        padded.append(torch.cat([stream, torch.ones(missing, dtype=torch.long)]))
        ends += [len(x) for x in row] + ([missing] if missing else [])
    return torch.stack(padded), nn.functional.pad(torch.tensor(ends).cumsum(0), (1, 0)).int()


def sampled(stream, cu_seqlens=None, length=None, joint=False, answers=None, chunk=None):
    """(what the teacher reads, the sampled queries)."""
    how = Distillation(
        SimpleNamespace(length=length), "self", LANDMARK, gate_weight=1.0, block_size=FREQ + 1, joint=joint, chunk=chunk
    )
    text = how.read(stream, cu_seqlens)
    known = stream != LANDMARK
    answers = torch.zeros_like(known) if answers is None else answers
    chosen = how.sample(text, stream, known, answers, cu_seqlens)
    labels = stream.masked_fill(~known, IGNORED_TARGET)
    counts = how.counts(how.asked(stream, labels, answers, cu_seqlens))
    assert counts[4] == chosen.real.sum()
    return text, chosen


def taught(q, k, chosen, *how):
    """What a teacher's layer gives to blocks."""
    return block_shares(block_logits(q, k, chosen, *how), chosen)


def asked(q, k, chosen, *how):
    """Logarithms of what a student's layer does."""
    return outer_shares(landmark_logits(q, k, chosen, *how), chosen)


def random_layers(stream, text, heads=4, groups=2, dim=8, seed=0):
    """Queries and keys of a teacher's and a student's layer, float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(number, tokens):
        return 2 * torch.randn(len(stream), number, tokens, dim, dtype=torch.float64, generator=generator)

    read = text.tokens.shape[1]
    return draw(heads, read), draw(groups, read), draw(heads, stream.shape[1]), draw(groups, stream.shape[1])


def blocks_and_documents(stream, row, cu_seqlens):
    """Which block and which document of its row each place of the stream is of."""
    ends = set() if cu_seqlens is None else set(cu_seqlens.tolist())
    block, document, blocks, documents = -1, -1, [], []
    for place in range(stream.shape[1]):
        new_document = place == 0 or row * stream.shape[1] + place in ends
        document += new_document
        block += new_document or stream[row, place - 1] == LANDMARK
        blocks.append(int(block))
        documents.append(document)
    return blocks, documents


def by_whole_matrices(teacher, student, stream, cu_seqlens, joint=False):
    """KL of every text position and head, by loops over full softmaxes: {(row, place in the stream): (H,)}. joint:
    among earlier blocks alone."""
    found = {}
    for row in range(len(stream)):
        blocks, documents = blocks_and_documents(stream, row, cu_seqlens)
        is_text = [token != LANDMARK for token in stream[row].tolist()]
        places = [place for place, text in enumerate(is_text) if text]
        for t, place in enumerate(places):
            if t >= teacher[0].shape[2]:
                continue
            divergences = []
            for head in range(teacher[0].shape[1]):
                (tq, tk), (sq, sk) = (
                    (q[row, head], k[row, head // (q.shape[1] // k.shape[1])]) for q, k in (teacher, student)
                )
                scale = tq.shape[-1] ** -0.5
                seen = [u for u in range(t + 1) if documents[places[u]] == documents[place]]
                own = [] if joint else [u for u in range(place + 1) if blocks[u] == blocks[place]]
                if joint:
                    seen = [u for u in seen if blocks[places[u]] != blocks[place]]
                attention = torch.softmax(tk[seen] @ tq[t] * scale, 0)
                earlier = sorted({blocks[places[u]] for u in seen} - {blocks[place]})
                landmarks = [max(u for u in range(place) if blocks[u] == b) for b in earlier]
                outer = torch.log_softmax(sk[landmarks + own] @ sq[place] * scale, 0)
                kl = torch.zeros((), dtype=tq.dtype)
                for n, b in enumerate(earlier if joint else [*earlier, blocks[place]]):
                    given = attention[[i for i, u in enumerate(seen) if blocks[places[u]] == b]].sum()
                    asked = outer[n] if b != blocks[place] else outer[len(earlier) :].logsumexp(0)
                    kl = kl + given * (given.log() - asked)
                divergences.append(kl)
            found[row, place] = torch.stack(divergences)
    return found


@pytest.mark.parametrize("joint", [False, True], ids=["grouped", "joint"])
@pytest.mark.parametrize(("documents", "length"), [(False, None), (False, 17), (True, None)])
def test_it_is_the_divergence_of_whole_matrices(documents, length, joint):
    stream, cu_seqlens = some_streams(documents)
    text, chosen = sampled(stream, cu_seqlens, length, joint)
    tq, tk, sq, sk = random_layers(stream, text)
    found = divergence(taught(tq, tk, chosen, 8**-0.5), asked(sq, sk, chosen, 8**-0.5))
    wanted = by_whole_matrices((tq, tk), (sq, sk), stream, cu_seqlens, joint)
    places = [(row, int(place)) for row in range(2) for place in chosen.stream[row][chosen.real[row]]]
    assert (chosen.real.all() or joint) and len(set(places)) == len(places) >= 6
    assert torch.isfinite(found).all()
    found = found[chosen.real]
    if not documents:
        # None stands in a row's first block, none in one that another stands in.
        assert min(place for _, place in places) > FREQ
        assert joint or len({(row, place // (FREQ + 1)) for row, place in places}) == len(places)
    torch.testing.assert_close(found, torch.stack([wanted[place].mean() for place in places]))
    assert (found > 0.01).sum() > 3


@pytest.mark.parametrize("rotary_dim", [8, 4], ids=["all of a head rotated", "half of it"])
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
def test_of_a_window_that_is_read_in_chunks_it_asks_what_reading_scores(documents, rotary_dim):
    stream, cu_seqlens = some_streams(documents)
    size, top_k, dim = FREQ + 1, 2, 8
    chunk = 2 * size
    text, chosen = sampled(stream, cu_seqlens, joint=True, chunk=chunk)
    tq, tk, sq, sk = random_layers(stream, text, dim=dim)
    settings = WindowSettings(chunk, size, top_k, joint=True)
    frequencies = default_inverse_frequencies(rotary_dim).double()
    window = ReadingWindow.make(settings, *stream.shape, frequencies, cu_seqlens=cu_seqlens)
    shares, outer = taught(tq, tk, chosen, 0.3), asked(sq, sk, chosen, 0.3, window)
    is_text = stream != LANDMARK
    count = 0
    for row, s in chosen.real.nonzero().tolist():
        place, end = int(chosen.stream[row, s]), int(chosen.end[row, s])
        of_chunk = window.chunks[window.chunk_of[row, place]].tolist()
        # The blocks before the chunk, the newest first.
        blocks = window.blocks[of_chunk[3] : of_chunk[3] + of_chunk[4]].flip(0).long()
        keys = rotate(sk[row, :, blocks[:, 1] + size - 1], *window.by(-blocks[:, 2]))
        earlier = torch.tensor([len(blocks)])
        scores = score_bounded(sq[row : row + 1, :, place : place + 1], keys[None], earlier, top_k, window, False, 0.3)
        wanted = scores[0, :, 0].flip(-1).log_softmax(-1)
        columns = slice(end - len(blocks), end)
        torch.testing.assert_close(outer[row, :, s, columns], wanted)
        assert torch.isinf(outer[row, :, s]).sum() == 4 * (outer.shape[-1] - len(blocks))
        # And of the teacher's attention what these blocks' text gets.
        begin, behind = int(blocks[-1, 1]), int(blocks[0, 1]) + size
        places = [at for at in range(begin, behind) if is_text[row, at]]
        index = text.index[row, places]
        heads = torch.arange(4) // 2
        query = tq[row, :, int(text.index[row, place])]
        weights = torch.softmax((tk[row, heads][:, index] @ query[..., None]).squeeze(-1) * 0.3, -1)
        torch.testing.assert_close(shares[row, :, s, columns], weights.unflatten(-1, (-1, FREQ)).sum(-1))
        count += 1
    assert count >= 5
    found = divergence(shares, outer)
    assert torch.isfinite(found).all() and (found[chosen.real] > 0).all()


def test_where_landmarks_only_choose_some_queries_are_of_answers_and_their_questions():
    stream = insert_landmarks(some_texts(2, 400), FREQ, LANDMARK)
    answers = torch.zeros(stream.shape, dtype=torch.bool)
    answers[0, 300:304] = answers[0, 450:452] = True
    _, without = sampled(stream, joint=True)
    without = dataclasses.replace(without, text=without.text[:, :TEXT_SAMPLED])
    _, chosen = sampled(stream, joint=True, answers=answers & (stream != LANDMARK))
    count = without.text.shape[1]
    assert torch.equal(chosen.text[:, :count], without.text) and not chosen.real[1, count:].any()
    assert not without.real[:, TEXT_SAMPLED:].any()
    places = chosen.stream[0, count:][chosen.real[0, count:]]
    of_text = answers[0][stream[0] != LANDMARK]
    # Those that are asked already are not asked again.
    before = chosen.text[0, :count].tolist()
    near = [t for t in range(len(of_text)) if of_text[t : t + QUESTION + 1].any() and t not in before]
    assert len(near) < ANSWERS_SAMPLED and sorted(chosen.text[0, count:][chosen.real[0, count:]].tolist()) == near
    assert (places > 400).sum() > 10 < (places < 310).sum()
    # Blocks to choose from there have to be, and grouped nothing changes.
    assert (chosen.own > chosen.first)[chosen.real].all()
    assert torch.equal(sampled(stream, answers=answers)[1].text, sampled(stream)[1].text)


def test_no_more_answers_are_asked_than_so_many():
    stream = insert_landmarks(some_texts(1, 2 * ANSWERS_SAMPLED), FREQ, LANDMARK)
    known = stream != LANDMARK
    _, chosen = sampled(stream, joint=True, answers=known)
    places = chosen.stream[0, -ANSWERS_SAMPLED:]
    assert len(places.unique()) == ANSWERS_SAMPLED and known[0, places].all()
    assert ANSWERS_SAMPLED / 4 < (places > len(stream[0]) / 2).sum() < ANSWERS_SAMPLED * 3 / 4


@pytest.mark.parametrize("chunk", [None, 4 * (FREQ + 1)], ids=["whole", "in chunks"])
@pytest.mark.parametrize("lengths", [[400], [230, 170]], ids=["one document", "two"])
def test_where_landmarks_only_choose_some_queries_are_of_what_the_text_repeats(lengths, chunk):
    """Of what it repeats of a block that can be chosen: of the same document, and of a chunk before."""
    texts = torch.randint(10, 22, (2, sum(lengths)), generator=torch.Generator().manual_seed(0))
    stream = torch.cat([insert_landmarks(part, FREQ, LANDMARK) for part in texts.split(lengths, 1)], 1)
    ends = [length + length // FREQ for length in lengths]
    cu_seqlens = nn.functional.pad(torch.tensor(ends * 2).cumsum(0), (1, 0)).int() if len(lengths) > 1 else None
    _, chosen = sampled(stream, cu_seqlens, joint=True, chunk=chunk)
    together = FREQ if chunk is None else chunk // (FREQ + 1) * FREQ
    for row in range(2):
        places, done = set(), 0
        for length in lengths:
            text = texts[row, done : done + length].tolist()
            places |= {
                done + t
                for t in range(2, length)
                if any(text[u - 2 : u + 1] == text[t - 2 : t + 1] for u in range(2, t // together * together))
            }
            done += length
        evenly = chosen.text[row, :TEXT_SAMPLED].tolist()
        found = chosen.text[row, TEXT_SAMPLED:][chosen.real[row, TEXT_SAMPLED:]].tolist()
        assert 10 < len(found) == len(set(found)) == min(REPEATED_SAMPLED, len(places - set(evenly)))
        assert set(found) <= places - set(evenly)


@pytest.mark.parametrize("chunk", [None, 4 * (FREQ + 1)], ids=["whole", "in chunks"])
def test_no_query_is_asked_twice_and_none_is_drawn_that_does_not_count(chunk):
    # All of it repeats itself, and half of it is answers, of which some do not count.
    texts = torch.randint(10, 13, (2, 700), generator=torch.Generator().manual_seed(0))
    stream = insert_landmarks(texts, FREQ, LANDMARK)
    answers = torch.zeros(stream.shape, dtype=torch.bool)
    answers[:, :500] = stream[:, :500] != LANDMARK
    _, chosen = sampled(stream, joint=True, answers=answers, chunk=chunk)
    for row in range(2):
        places = chosen.stream[row][chosen.real[row]].tolist()
        assert len(places) == len(set(places)) and min(places) >= (chunk or FREQ + 1)
        drawn = chosen.real[row, TEXT_SAMPLED:]
        assert drawn[:REPEATED_SAMPLED].all() and drawn[REPEATED_SAMPLED:].sum() > 180


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_teacher_of_few_positions_is_asked_nothing(length):
    stream, _ = some_streams()
    text, chosen = sampled(stream, length=length, joint=True)
    assert text.tokens.shape[1] == length and not chosen.real.any()
    tq, tk, sq, sk = random_layers(stream, text)
    found = divergence(taught(tq, tk, chosen, 1.0), asked(sq, sk, chosen, 1.0))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("joint", [False, True], ids=["grouped", "joint"])
def test_its_gradient(joint):
    stream, _ = some_streams()
    text, chosen = sampled(stream, joint=joint)
    tq, tk, sq, sk = random_layers(stream, text, dim=4)
    shares = taught(tq, tk, chosen, 0.5)
    given = sq.requires_grad_(), sk.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: divergence(shares, asked(q, k, chosen, 0.5)), given, fast_mode=True)
    # None reaches what nobody asked about: keys of other blocks' text.
    (gradient,) = torch.autograd.grad(divergence(shares, asked(*given, chosen, 0.5)).sum(), sk)
    used = torch.zeros(stream.shape, dtype=torch.bool)
    for row in range(2):
        for place in [] if joint else chosen.stream[row].tolist():
            used[row, place // (FREQ + 1) * (FREQ + 1) : place + 1] = True
    used |= stream == LANDMARK
    assert not gradient.abs().sum((1, 3))[~used].any()


def test_it_is_nothing_where_landmarks_logits_are_the_log_sum_exp_of_their_blocks():
    stream, _ = some_streams()
    text, chosen = sampled(stream, length=38)
    dim = 16
    _, _, q, k = random_layers(stream, text, heads=2, groups=2, dim=dim)
    is_text = stream != LANDMARK
    tq, tk = (x.transpose(1, 2)[is_text].view(2, -1, 2, dim).transpose(1, 2) for x in (q, k))
    shares = taught(tq, tk, chosen, dim**-0.5)
    before = divergence(shares, asked(q, k, chosen, dim**-0.5))
    assert (before > 1e-3).all()
    for row in range(2):
        queries = q[row][:, chosen.stream[row]]
        for end in (stream[row] == LANDMARK).nonzero().flatten().tolist():
            logits = queries @ k[row][:, end - FREQ : end].transpose(1, 2) * dim**-0.5
            # As many equations as queries, fewer than unknowns.
            k[row][:, end] = (torch.linalg.pinv(queries) @ logits.logsumexp(-1, keepdim=True)).squeeze(-1) / dim**-0.5
    torch.testing.assert_close(divergence(shares, asked(q, k, chosen, dim**-0.5)), torch.zeros_like(before))


def test_rows_choose_by_their_own_tokens_and_no_more_than_so_many():
    stream = insert_landmarks(some_texts(3, 2000), FREQ, LANDMARK)
    _, together = sampled(stream)
    assert together.text.shape == (3, SAMPLED) and not torch.equal(together.text[0], together.text[1])
    for row in range(3):
        assert torch.equal(sampled(stream[row : row + 1])[1].text[0], together.text[row])


def gated(family="llama", **weights):
    """(student's loss, teacher's model, how it learns) with the gate's loss."""
    return pair(family, block_size=FREQ + 1, **({"gate_weight": 0.7} | weights))


# Layers with a sliding window have no gate: gemma3 has a test of its own below.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3"])
def test_the_teachers_shares_are_those_of_its_attention_weights(family):
    loss, teacher, how = gated(family)
    batch = batch_of(some_texts(), how.landmark_token_id)
    text = how.read(batch["input_ids"])
    known = batch["labels"] != IGNORED_TARGET
    chosen = how.sample(text, batch["input_ids"], known, torch.zeros_like(known), None)
    gate = Gate(chosen, range(teacher.config.num_hidden_layers))
    plain = how.teacher.logits(text.tokens)
    assert torch.equal(how.teacher.logits(text.tokens, None, gate.teach), plain)
    teacher.set_attn_implementation("eager")
    attentions = teacher(text.tokens, output_attentions=True).attentions
    assert len(gate._taught) == len(attentions) == teacher.config.num_hidden_layers
    for layer, weights in enumerate(attentions):
        shares = block_shares(gate._taught[layer], chosen)
        wanted = torch.zeros_like(shares)
        for row in range(2):
            for s, t in enumerate(chosen.text[row].tolist()):
                for u in range(t + 1):
                    block = u // FREQ if u // FREQ != t // FREQ else -1
                    wanted[row, :, s, block] += weights[row, :, t, u]
        assert_close_norm(shares, wanted)


def test_what_the_teachers_sliding_window_hides_gets_nothing():
    """Windows that are read in chunks go beyond it, though no chunk with its blocks does."""
    reach, tokens = 11, 38
    teacher = tiny_decoder("mistral-wide-window", sliding_window=reach)
    stream = insert_landmarks(some_texts(1, tokens), FREQ, LANDMARK)
    text, chosen = sampled(stream, joint=True, chunk=FREQ + 1)
    gate = Gate(chosen, [0, 1])
    Teacher(teacher).logits(text.tokens % 257, None, gate.teach)
    teacher.set_attn_implementation("eager")
    attentions = teacher(text.tokens % 257, output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        shares = block_shares(gate._taught[layer], chosen)
        wanted = torch.zeros_like(shares)
        for s, t in enumerate(chosen.text[0].tolist()):
            for u in range(t // FREQ * FREQ):
                wanted[0, :, s, u // FREQ] += weights[0, :, t, u]
        wanted /= wanted.sum(-1, keepdim=True).clamp(min=1e-30)
        assert (wanted == 0).any() and (chosen.text > reach + FREQ).any()
        assert_close_norm(shares[:, :, chosen.real[0]], wanted[:, :, chosen.real[0]])


def test_all_else_is_the_same_to_the_bit():
    batch = batch_of(some_texts(), pair()[2].landmark_token_id, [(0, 3)])
    (off, _, how_off), (on, _, how_on) = pair(), gated()
    without, parts = step(off, [batch], how_off)
    with_gate, gate_parts = step(on, [batch], how_on)
    assert torch.equal(parts[:4], gate_parts[:4]) and parts[4] == 0 and gate_parts[4] > 0
    torch.testing.assert_close(with_gate, without + 0.7 * gate_parts[4])
    # And rows apart add up to the same.
    rows = [{name: values[row : row + 1] for name, values in batch.items()} for row in range(2)]
    assert_close_norm(step(on, rows, how_on), (with_gate, gate_parts))


@pytest.mark.parametrize(("family", "layers"), [("llama", [0, 1]), ("gemma3", [1]), ("ministral", [1])])
def test_what_the_teacher_shares_out_in_a_layer_without_landmarks_is_not_worked_out(family, layers, monkeypatch):
    logits, taught, asked = gate_module.block_logits, [], []
    monkeypatch.setattr(gate_module, "block_logits", lambda *given: taught.append(logits(*given)) or taught[-1])
    monkeypatch.setattr(
        Gate,
        "ask",
        lambda self, layer, *given, ask=Gate.ask: asked.append(layer.layer_idx) or ask(self, layer, *given),
    )
    loss, _, how = gated(family)
    assert step(loss, [batch_of(some_texts(), how.landmark_token_id)], how)[1][4] > 0
    assert asked == layers and len(taught) == len(layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reach", [None, 7])
def test_to_a_compiler_logits_of_blocks_are_one_operation(dtype, reach):
    stream, cu_seqlens = some_streams(True)
    text, chosen = sampled(stream, cu_seqlens, joint=True)
    q, k = (x.to(dtype) for x in random_layers(stream, text)[:2])
    found = block_logits(q, k, chosen, 0.3, reach)
    given = q, k, chosen.text, chosen.spans, chosen.text_blocks, 0.3, reach
    torch.library.opcheck(torch.ops.landmark.block_logits, given)
    compiled = torch.compile(lambda q, k: block_logits(q, k, chosen, 0.3, reach), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k), found) and found.isfinite().any()


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_computed_again_its_gradient_is_the_same(family):
    gradients = []
    for again in (False, True):
        loss, _, how = gated(family, answer_weight=0.0, gate_weight=5.0)
        if again:
            checkpoint_activations(loss.wrapped)
        batch = batch_of(some_texts(), how.landmark_token_id)
        step(loss, [batch], how)[0].backward()
        gradients.append([parameter.grad for parameter in loss.parameters() if parameter.grad is not None])
    assert_close_norm(*gradients)


def test_under_autocast_its_products_are_not_in_half_precision():
    found = []
    for half in (False, True):
        loss, _, how = gated()
        batch = batch_of(some_texts(), how.landmark_token_id)
        # Queries and keys in float32 all the same: only what is made of them is in question.
        known = batch["labels"] != IGNORED_TARGET
        given = how.read(batch["input_ids"]), batch["input_ids"], known, torch.zeros_like(known), None
        gate = Gate(how.sample(*given), [0])
        tokens = batch["input_ids"].shape[1]
        q, k = torch.randn(2, 2, 4, tokens, 8, generator=torch.Generator().manual_seed(0))
        gate.teach(FIRST, q, k, None)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            gate.ask(FIRST, q, k, None)
        found.append(gate.loss())
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_compiled_it_is_the_same(again):
    loss, _, how = gated()
    if again:
        checkpoint_activations(loss.wrapped)
    assert_compiled_it_is_the_same(loss, how)
