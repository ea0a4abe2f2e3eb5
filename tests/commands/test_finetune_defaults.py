"""`landmark finetune`: what is left to the model, the teacher and the memory, and what a dry run measures."""

import dataclasses

import pytest
import yaml
from safetensors.torch import load_file

from landmark_cli.commands import finetune_plan, plan
from landmark_cli.commands.finetune import FinetuneOptions, run
from landmark_cli.commands.finetune_plan import with_defaults
from landmark_cli.commands.run_options import compiles_layers
from landmark_cli.commands.train import TrainOptions
from landmark_cli.models.pretrained import open_config
from landmark_cli.training import fit, metrics, setup
from tests.closeness import assert_close_norm
from tests.data.test_mixing import prose
from tests.models.families import tiny_decoder, tiny_tokenizer

CHOSEN = ("sequence_length", "batch_size", "accumulation", "steps", "lr", "gradient_checkpointing", "eval_windows")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("defaults")
    tiny_decoder("llama", initializer_range=0.1, max_position_embeddings=256).save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    (root / "barges.txt").write_text(prose("barge", 200))
    return root


@pytest.fixture(autouse=True)
def in_the_place(place, fresh_accelerator, monkeypatch):
    monkeypatch.chdir(place)


def chosen(**given):
    options = with_defaults(FinetuneOptions(**{"model": "base", "device": "cpu"} | given), open_config("base"))
    assert not [name for name in CHOSEN if getattr(options, name) is None]
    return tuple(getattr(options, name) for name in CHOSEN)


def test_beside_a_teacher_windows_are_as_long_as_the_models_positions():
    assert chosen() == (256, 2, 64, 900, 3e-4, False, 128)
    assert chosen(sequence_length=128, steps=2, batch_size=1, accumulation=3) == (128, 1, 3, 2, 3e-4, False, 8)


def test_without_a_teacher_all_is_as_it_was():
    assert chosen(teacher="none") == (2048, 2, 8, 15_000, 2e-5, False, 128)


def test_recipes_that_say_all_are_not_touched():
    given = dict(zip(CHOSEN, (64, 2, 3, 7, 1e-3, False, 5), strict=True))
    for teacher in ("none", "self"):
        assert chosen(teacher=teacher, **given) == tuple(given.values())


def test_activations_are_computed_again_where_memory_asks_for_it_which_is_said(monkeypatch, capfd):
    options = FinetuneOptions(model="base", device="cpu", batch_size=2, softmax="joint")
    shapes = finetune_plan.shapes_of(options)
    sized = dataclasses.replace(options, sequence_length=256)
    least, most = (finetune_plan.memory_needed(sized, shapes, again) for again in (True, False))
    assert least < most
    for memory, expected in ((most, False), (most - 1, True), (least, True)):
        monkeypatch.setattr(fit, "device_memory", lambda device, memory=memory: memory)
        assert chosen(batch_size=2)[5] is expected
        assert ("gradient checkpointing, a third more work: without it" in capfd.readouterr().err) == expected
        assert chosen(batch_size=2, gradient_checkpointing=not expected, sequence_length=256)[5] is not expected
    monkeypatch.setattr(fit, "device_memory", lambda device: 1)
    capfd.readouterr()
    assert chosen(batch_size=2)[0] == 128
    assert "are needed, and the device has 1 B for a run" in " ".join(capfd.readouterr().err.split())


def test_on_a_cpu_matrices_of_all_pairs_are_kept_where_landmarks_do_more_than_choose():
    def needed(**given):
        options = FinetuneOptions(model="base", device="cpu", batch_size=2, sequence_length=256, **given)
        return finetune_plan.memory_needed(options, finetune_plan.shapes_of(options), False)

    plain = needed(softmax="joint")
    assert needed(softmax="grouped") > plain
    assert needed(softmax="joint", mask_documents=True) == plain


def test_the_hidden_states_loss_is_reckoned_with():
    options = FinetuneOptions(model="base", device="cpu", batch_size=2, sequence_length=256, steps=1)
    compared = dataclasses.replace(options, hidden_weight=0.5)
    shapes = finetune_plan.shapes_of(options)
    less, more = (finetune_plan.memory_needed(one, shapes, False) for one in (options, compared))
    # Two layers of width 32, in float32: what each gave, and how far it is.
    assert more - less == 2 * 2 * 256 * 32 * (4 + 4)


def test_what_was_chosen_is_in_the_recipe(tmp_path):
    given = {"steps": 1, "batch_size": 1, "accumulation": 1, "eval_every": 0, "device": "cpu", "landmark_freq": 31}
    run(FinetuneOptions(model="base", data=["barges.txt"], output=tmp_path / "run", **given))
    saved = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert {name: saved[name.replace("_", "-")] for name in CHOSEN} == dict(
        zip(CHOSEN, (256, 1, 1, 1, 3e-4, False, 8), strict=True)
    )
    assert open_config(tmp_path / "run").trained_length == 256


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"teacher": "none"}, {"train": "landmarks"}])
def test_a_dry_run_measures_steps(tmp_path, capsys, monkeypatch, changes):
    given = {"sequence_length": 64, "landmark_freq": 7, "batch_size": 1, "accumulation": 2, "steps": 7200}
    options = FinetuneOptions(model="base", output=tmp_path / "run", dry_run=True, device="cpu", **given | changes)
    run(options)
    assert "s a step, by 3 micro-batches; preparing and evaluating aside" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(plan, "CPU_OPERATIONS", 1e3)
    run(options)
    assert "not measured: a step takes a CPU long" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gpt-oss", "smollm3", "cohere2"])
def test_a_dry_run_measures_layers_of_several_kinds(tmp_path, capsys, family):
    tiny_decoder(family).save_pretrained(tmp_path / family)
    tiny_tokenizer().save_pretrained(tmp_path / family)
    given = {"sequence_length": 64, "landmark_freq": 7, "batch_size": 1, "accumulation": 1, "steps": 7200}
    run(FinetuneOptions(model=str(tmp_path / family), dry_run=True, device="cpu", **given))
    assert "s a step, by 3 micro-batches; preparing and evaluating aside" in " ".join(capsys.readouterr().out.split())


@pytest.fixture
def on_a_gpu(monkeypatch):
    """One of a peak that makes a step of these models take some seconds, for all that the defaults know."""
    monkeypatch.setattr(setup, "uses_cpu", lambda device: False)
    monkeypatch.setattr(fit, "device_memory", lambda device: 16 << 30)
    monkeypatch.setattr(metrics, "peak_flops", lambda device, precision: 1e11)


@pytest.mark.parametrize(
    ("given", "compiled"),
    [
        ({}, True),
        ({"steps": 2}, False),
        ({"steps": 2, "compile": True}, True),
        ({"compile": False}, False),
        ({"gate_weight": 1.0}, True),
        ({"lora_rank": 4}, True),
        ({"lora_rank": 4, "four_bit": True}, False),
        ({"read_chunk": 128, "top_k_blocks": 1}, True),
        ({"read_chunk": 128, "top_k_blocks": 1, "explore": 0.1}, False),
    ],
    ids=str,
)
def test_long_runs_on_a_gpu_are_compiled(given, compiled, on_a_gpu, monkeypatch):
    sizes = {"sequence_length": 256, "batch_size": 2, "accumulation": 64, "precision": "fp32"}
    options = FinetuneOptions(model="base", device="cpu", **sizes, **given)
    assert with_defaults(options, open_config("base")).compile is compiled
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert with_defaults(options, open_config("base")).compile is given.get("compile", False)


def test_on_a_cpu_none_is():
    options = FinetuneOptions(model="base", device="cpu", steps=10**6)
    assert with_defaults(options, open_config("base")).compile is False


@pytest.mark.parametrize(
    ("given", "layers"),
    [({}, True), ({"compile": False}, False), ({"gate_weight": 1.0}, True), ({"explore": 0.1}, False)],
    ids=str,
)
def test_what_is_compiled_are_layers_where_they_are_alike(given, layers):
    assert compiles_layers(FinetuneOptions(**{"model": "base", "compile": True} | given)) is layers
    assert not compiles_layers(TrainOptions(compile=True))


@pytest.mark.slow
def test_a_compiled_run_leaves_what_another_goes_on_from(tmp_path):
    given = {"batch_size": 1, "accumulation": 1, "eval_every": 0, "landmark_freq": 31, "eval_ruler": "none"}
    given |= {"model": "base", "data": ["barges.txt"], "device": "cpu", "steps": 4, "save_every": 2, "keep": 2}
    made = [FinetuneOptions(output=tmp_path / str(n), compile=n == 0, **given) for n in range(2)]
    for options in made:
        run(options)
    weights = [load_file(options.output / "model.safetensors") for options in made]
    assert_close_norm(*weights)
    for options in made:
        (options.output / "checkpoints/step-00000004").rename(options.output / "aside")
    resumed = run(dataclasses.replace(made[0], compile=False, resume=True))
    assert_close_norm(load_file(resumed / "model.safetensors"), weights[0])
