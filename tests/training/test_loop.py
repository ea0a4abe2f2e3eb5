"""The loop: one loss whatever the split, exact resumption, evaluation, the directory it leaves."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from landmark_cli.training.publish import Publication, second_names
from tests.closeness import assert_close_norm
from tests.training.command import records
from tests.training.tiny import RandomBatches, RandomWindows, tiny_loop, tiny_model


def test_the_split_into_micro_batches_does_not_change_the_run(tmp_path):
    curves = []
    for batch_size, accumulation in [(8, 1), (4, 2), (1, 8)]:
        output = tmp_path / f"{batch_size}x{accumulation}"
        tiny_loop(output, batch_size=batch_size, accumulation=accumulation).run()
        curves.append(records(output) + records(output, "gradient_norm"))
    assert_close_norm(curves[1], curves[0])
    assert_close_norm(curves[2], curves[0])


def test_the_first_loss_is_the_mean_over_the_targets_of_the_whole_batch(tmp_path):
    model, batch = tiny_model(), RandomBatches(8).batch(0, 0, 8)
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], labels=batch["labels"], shift_labels=batch["labels"]).loss
    tiny_loop(tmp_path, steps=1, batch_size=2, accumulation=4).run()
    assert_close_norm(records(tmp_path)[0], expected)


def test_a_micro_batch_without_targets_adds_nothing(tmp_path):
    class Sparse(RandomBatches):
        def batch(self, step, start, stop):
            batch = super().batch(step, start, stop)
            batch["labels"][: 4 - start if start < 4 else 0] = -100
            return batch

    loop = tiny_loop(tmp_path, steps=2, batch_size=4, accumulation=2)
    loop.batches = Sparse(8)
    loop.run()
    assert all(math.isfinite(value) for value in records(tmp_path) + records(tmp_path, "gradient_norm"))


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    through, cut = tmp_path / "through", tmp_path / "cut"
    tiny_loop(through, steps=7, model=tiny_model(dropout=0.3), save_every=7).run()

    first = tiny_loop(cut, steps=7, model=tiny_model(dropout=0.3), save_every=3)
    checkpoint, save = [], first.checkpoints.save

    def stop_after_saving(*arguments):
        checkpoint.append(save(*arguments))
        raise KeyboardInterrupt

    first.checkpoints.save = stop_after_saving
    with pytest.raises(KeyboardInterrupt):
        first.run()
    torch.rand(17)
    second = tiny_loop(cut, steps=7, model=tiny_model(seed=9, dropout=0.3), save_every=7)
    assert second.resume() and second.step == 3
    second.run()

    name = "checkpoints/step-00000007/model.safetensors"
    ours, theirs = load_file(cut / name), load_file(through / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert records(cut) == records(through)
    assert records(cut, "step") == list(range(1, 8))


def test_evaluation_is_the_mean_over_its_rows_whatever_the_batch(tmp_path):
    validation = [RandomWindows(4), RandomWindows(2)]
    batches = [windows.batch(0, len(windows)) for windows in validation]
    batch = {name: torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        model = tiny_model()
        expected = model(input_ids=batch["input_ids"], labels=batch["labels"], shift_labels=batch["labels"]).loss
    for size in (1, 3, 4, 6):
        loop = tiny_loop(tmp_path, batch_size=size, accumulation=1, validation=validation)
        assert_close_norm(loop.evaluate().whole.loss, expected)
        assert loop.module.training


def test_evaluation_and_saving_do_not_disturb_training(tmp_path):
    model = {"dropout": 0.2}
    tiny_loop(tmp_path / "quiet", model=tiny_model(**model)).run()
    validation = [RandomWindows(6)]
    busy = tiny_loop(
        tmp_path / "busy", model=tiny_model(**model), validation=validation, evaluate_every=1, save_every=2
    )
    busy.run()
    assert records(tmp_path / "busy") == records(tmp_path / "quiet")
    assert len(records(tmp_path / "busy", "validation_perplexity")) == 6


def test_the_written_model_opens_with_transformers(tmp_path):
    model = tiny_model()
    loop = tiny_loop(tmp_path, model=model)
    publication = Publication(
        model, tmp_path, lambda directory: (directory / "recipe.yaml").write_text("command: train\n")
    )
    assert not list(tmp_path.iterdir())
    loop.run()
    publication.publish(loop)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "recipe.yaml", "metrics.jsonl"} <= names
    assert not any("partial" in name for name in names)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened.config.landmark_freq == 7 and opened.config._attn_implementation == "landmark"
    ids = RandomBatches(1).batch(0, 0, 1)["input_ids"]
    with torch.no_grad():
        assert torch.equal(opened.eval()(ids).logits, loop.module.eval().wrapped(ids).logits)


def test_tied_weights_are_written_under_their_first_name():
    assert second_names(tiny_model()) == {"lm_head.weight"}
    assert second_names(tiny_model(tie_word_embeddings=False)) == set()


def test_frozen_weights_neither_train_nor_fill_the_checkpoint(tmp_path):
    model = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    loop = tiny_loop(tmp_path, steps=2, model=model, save_every=2)
    loop.run()
    assert torch.equal(model.model.embed_tokens.weight, before)
    saved = load_file(tmp_path / "checkpoints/step-00000002/model.safetensors")
    assert saved and not any("embed" in name or "head" in name for name in saved)
    loop.checkpoints.load(loop.checkpoints.newest())


def test_batches_of_another_size_are_refused(tmp_path):
    loop = tiny_loop(tmp_path)
    with pytest.raises(ValueError, match="batches: 5 rows a step, but 1 processes x 2 x 4 take 8"):
        type(loop)(loop.accelerator, tiny_model(), RandomBatches(5), loop.settings, {})
