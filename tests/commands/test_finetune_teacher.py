"""`landmark finetune --teacher`: it learns, is resumed and split as any run, and says what does not go together."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import landmark_cli
from landmark_cli.commands.finetune import FinetuneOptions, check_launch, run
from landmark_cli.commands.finetune_defaults import GATE as GATE_WEIGHT
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.options import build, load_recipe
from landmark_cli.training.distillation import Distillation
from landmark_cli.training.teachers import Teacher
from tests.awkward_tokenizers import byte_tokenizer
from tests.closeness import assert_close_norm
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.training.command import records
from tests.training.test_processes import FSDP, FSDP_ON_CPU
from tests.training.tiny import write_questions

CHECKOUT = Path(landmark_cli.__file__).parent.parent
SHORT = {
    "softmax": "grouped",
    "landmark_freq": 7,
    "sequence_length": 64,
    "steps": 4,
    "eval_ruler": "none",
    "batch_size": 2,
    "accumulation": 2,
    "lr": 3e-3,
    "log_every": 1,
    "eval_every": 0,
    "device": "cpu",
}
LORA = {"lora_rank": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model, another one of its family, and questions whose answers are marked."""
    root = tmp_path_factory.mktemp("teacher")
    for name, changes in (("base", {}), ("other", {"initializer_range": 0.2}), ("deeper", {"num_hidden_layers": 3})):
        tiny_decoder("llama", **({"initializer_range": 0.1} | changes)).save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    tiny_decoder("gemma2").save_pretrained(root / "capped")
    tiny_tokenizer().save_pretrained(root / "capped")
    write_questions(root / "asked", root / "base")
    write_questions(root / "unmarked", root / "base", answers=False)
    return root


@pytest.fixture(autouse=True)
def in_the_place(place, fresh_accelerator, monkeypatch):
    monkeypatch.chdir(place)


def finetune(output, **changes):
    run(FinetuneOptions(**(SHORT | {"model": "base", "data": ["asked"], "output": Path(output)} | changes)))
    return Path(output)


GATE, HIDDEN = {"gate_weight": 2.0}, {"hidden_weight": 0.5}


@pytest.mark.parametrize(
    "changes",
    [{}, LORA, {"fused_loss": False}, GATE, GATE | HIDDEN | LORA | {"gradient_checkpointing": True}, HIDDEN],
    ids=["whole", "adapters", "logits", "gate", "gate, hidden states, adapters, computed again", "hidden states"],
)
def test_answers_are_learned_and_the_loss_is_its_parts(tmp_path, changes):
    output = finetune(
        tmp_path / "run", steps=12, answer_weight=0.5, answer_divergence_weight=0.75, text_weight=0.25, **changes
    )
    parts = "divergence", "answers_divergence", "answers_loss", "text_loss"
    divergence, asked, answers, text = (records(output, name) for name in parts)
    assert len(divergence) == len(text) == 12 and answers[-1] < answers[0] - 0.1
    rows = zip(divergence, asked, answers, text, strict=True)
    loss = [d + 0.75 * asked + 0.5 * a + 0.25 * t for d, asked, a, t in rows]
    gate = records(output, "gate")
    assert bool(gate) == ("gate_weight" in changes)
    if gate:
        assert len(gate) == 12 and gate[-1] < 0.95 * gate[0]
        loss = [rest + 2 * g for rest, g in zip(loss, gate, strict=True)]
    hidden = records(output, "hidden_states")
    assert bool(hidden) == ("hidden_weight" in changes)
    if hidden:
        assert len(hidden) == 12
        loss = [rest + 0.5 * h for rest, h in zip(loss, hidden, strict=True)]
    assert_close_norm(torch.tensor(records(output)), torch.tensor(loss))


@pytest.mark.parametrize("changes", [{}, LORA, {"train": "landmarks"}], ids=["whole", "adapters", "landmarks"])
def test_landmarks_that_only_choose_learn_by_the_gate_and_the_model_stays_what_it_was(tmp_path, changes):
    output = finetune(tmp_path / "run", softmax=None, steps=12, answer_weight=0.0, **changes)
    gate, divergence = records(output, "gate"), records(output, "divergence")
    assert load_recipe(output / "recipe.yaml", FinetuneOptions, "finetune")["softmax"] == "joint"
    assert load_recipe(output / "recipe.yaml", FinetuneOptions, "finetune")["gate_weight"] == GATE_WEIGHT
    assert len(gate) == 12 and gate[-1] < gate[0]
    # Read whole it is the untouched model, but for the positions that landmarks take.
    grouped = records(finetune(tmp_path / "grouped", steps=1, answer_weight=0.0, **changes), "divergence")
    assert divergence[0] < 0.2 * grouped[0]
    model, _ = landmark_cli.load(output)
    assert model.config.landmark_softmax == "joint"
    card = (output / "README.md").read_text()
    assert "| landmarks | choose blocks and do no more" in card and "predicts text less well" not in card
    card = (tmp_path / "grouped" / "README.md").read_text()
    assert "| landmarks | choose blocks, and share attention out" in card and "predicts text less well" in card
    assert BlockReader.open(model, ReadingSettings(top_k_blocks=1), 1).cache.settings.joint
    # One that chooses goes on choosing, in longer windows that are read in chunks too.
    if not changes:
        longer = {"sequence_length": 128, "read_chunk": 32, "top_k_blocks": 2, "batch_size": 1}
        again = finetune(
            tmp_path / "again", softmax=None, steps=6, model=str(output), teacher="base", gate_weight=5.0, **longer
        )
        assert landmark_cli.load(again)[0].config.landmark_softmax == "joint"
        gate = records(again, "gate")
        assert len(gate) == 6 and min(gate) > 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"teacher": "none"}, "--teacher none"),
        ({"gate_weight": 0.0}, "--gate-weight 0"),
    ],
    ids=["no teacher", "no gate"],
)
def test_landmarks_that_only_choose_have_to_be_taught(tmp_path, changes, why):
    with pytest.raises(UsageError, match=f"--softmax joint: .*{why}"):
        finetune(tmp_path / "run", softmax="joint", **changes)
    # A model in which they only choose says so, not whoever runs it.
    again = {"model": str(finetune(tmp_path / "joint", softmax=None, steps=1)), "softmax": None}
    with pytest.raises(UsageError, match=f"joint has landmarks that only choose .*{why}.*; leave that out, or"):
        finetune(tmp_path / "run", **again, **changes)


@pytest.mark.parametrize(
    "changes",
    [{"teacher": "none"}, {"gate_weight": 0.0}, {"teacher": "deeper"}, {"model": "capped"}],
    ids=["no teacher", "no gate", "another depth", "soft caps"],
)
def test_unasked_landmarks_do_more_where_no_teacher_can_show_which_blocks_matter(tmp_path, changes):
    finetune(tmp_path / "run", softmax=None, steps=1, **changes)
    assert getattr(landmark_cli.load(tmp_path / "run")[0].config, "landmark_softmax", "grouped") == "grouped"


def test_hidden_states_alone_are_learned(tmp_path):
    weights = dict.fromkeys(("answer_weight", "answer_divergence_weight"), 0.0)
    found = records(finetune(tmp_path / "run", steps=12, hidden_weight=100.0, **weights), "hidden_states")
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


@pytest.mark.parametrize(
    "changes", [pytest.param({}, id="whole"), pytest.param(LORA, id="adapters", marks=pytest.mark.slow)]
)
def test_another_model_teaches_what_it_knows(tmp_path, changes):
    to_self, to_other = (
        finetune(
            tmp_path / teacher, teacher=teacher, answer_weight=0.0, answer_divergence_weight=0.0, steps=12, **changes
        )
        for teacher in ("self", "other")
    )
    assert records(to_other, "divergence")[0] > records(to_self, "divergence")[0]
    assert records(to_other, "divergence")[-1] < 0.9 * records(to_other, "divergence")[0]
    assert_close_norm(torch.tensor(records(to_other)), torch.tensor(records(to_other, "divergence")))


@pytest.mark.parametrize(
    "changes", [pytest.param({}, id="whole", marks=pytest.mark.slow), pytest.param(LORA, id="adapters")]
)
def test_resumed_it_is_the_same_run(tmp_path, changes):
    whole, part = finetune(tmp_path / "whole", save_every=2, **changes), tmp_path / "part"
    shutil.copytree(whole / "checkpoints/step-00000002", part / "checkpoints/step-00000002")
    finetune(part, save_every=2, resume=True, **changes)
    name = "adapter_model.safetensors" if changes else "model.safetensors"
    assert (part / name).read_bytes() == (whole / name).read_bytes()
    assert records(part, "divergence") == records(whole, "divergence")[2:]
    others = (
        {"teacher": "other"},
        {"answer_weight": 2.0},
        {"answer_divergence_weight": 2.0},
        {"text_weight": 1.0},
        {"distill_temperature": 2.0},
        GATE,
    )
    for other in (*others, {"teacher": "none"}):
        ((option, value),) = other.items()
        # Without a teacher all of its settings differ, and a few are named.
        told = (
            "answer_weight is 0.02 there and None here.*more"
            if value == "none"
            else f"{option} is .* there and|{option}"
        )
        with pytest.raises(LandmarkError, match=told):
            finetune(part, save_every=2, resume=True, **(changes | other))


def test_a_model_with_landmarks_goes_on_as_it_reads_beside_the_untouched_one(tmp_path, capsys):
    """Windows are longer than its positions, of which chunks and blocks take a part; that is how it is then read."""
    first = finetune(tmp_path / "first", steps=8)
    long = {"sequence_length": 640, "read_chunk": 24, "top_k_blocks": 3, "batch_size": 1, "accumulation": 1, "steps": 1}
    second = finetune(tmp_path / "second", model=str(first), teacher="base", **long)
    (before, _), (after, tokenizer) = (landmark_cli.load(path) for path in (first, second))
    assert after.config.max_position_embeddings == before.config.max_position_embeddings == 512
    assert (after.config.trained_length, after.config.top_k_blocks) == ((3 + 1) * 8 + 24, 3)
    assert BlockReader(after).chunk == 3 * 7
    # No second token for landmarks, and no rows for one.
    assert tokenizer.get_vocab() == landmark_cli.load(first)[1].get_vocab()
    assert after.config.landmark_token_id == before.config.landmark_token_id
    assert after.get_input_embeddings().weight.shape == before.get_input_embeddings().weight.shape
    # Blocks of another size are others than it knows.
    assert "--landmark-freq" not in capsys.readouterr().err
    finetune(tmp_path / "others", model=str(first), landmark_freq=15, steps=1)
    assert "--landmark-freq 7 goes on with what it has learned" in " ".join(capsys.readouterr().err.split())
    finetune(tmp_path / "joint", model=str(first), softmax="joint", steps=1)
    told = " ".join(capsys.readouterr().err.split())
    assert "was trained with --softmax grouped, and this run has joint" in told and "--landmark-freq" not in told
    # It is beside the untouched model that it begins where the first run ended.
    beside_itself = finetune(tmp_path / "third", model=str(first), **long)
    divergences = [records(path, "divergence")[0] for path in (second, beside_itself)]
    assert divergences[0] > 1.2 * divergences[1] > 0


def test_a_teacher_is_no_part_of_what_is_saved(tmp_path):
    alone, taught = (finetune(tmp_path / name, teacher=name, save_every=4) for name in ("none", "self"))
    for file in ("model.safetensors", "checkpoints/step-00000004/model.safetensors"):
        assert load_file(alone / file).keys() == load_file(taught / file).keys()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": "none", "text_weight": 1.0}, UsageError, "--text-weight is for a teacher"),
        (
            {"teacher": "none", "answer_divergence_weight": 1.0},
            UsageError,
            "--answer-divergence-weight is for a teacher",
        ),
        ({"teacher": "none", "distill_temperature": 2.0}, UsageError, "--distill-temperature is for a teacher"),
        ({"teacher": "none", "gate_weight": 2.0}, UsageError, "--gate-weight is for a teacher"),
        (
            {"gate_weight": 2.0, "read_chunk": 16, "top_k_blocks": 2},
            UsageError,
            "--gate-weight with --softmax grouped is .* --read-chunk",
        ),
        ({"teacher": "none", "hidden_weight": 2.0}, UsageError, "--hidden-weight is for a teacher"),
        ({"hidden_weight": 2.0, "teacher": "deeper"}, LandmarkError, "one by one, and num_hidden_layers is 3 in --"),
        ({"gate_weight": 2.0, "teacher": "deeper"}, LandmarkError, "num_hidden_layers is 3 in --teacher deeper and 2"),
        (
            {"softmax": "joint", "teacher": "deeper"},
            LandmarkError,
            "--softmax joint .*, and num_hidden_layers is 3 in --teacher deeper and 2 .*: take --softmax grouped, or",
        ),
        (
            {"softmax": "joint", "model": "capped"},
            LandmarkError,
            "--softmax joint .* self .gemma2. soft-caps its logits or has attention sinks: take --softmax grouped",
        ),
        ({"answers_only": True}, UsageError, "--answers-only .* --teacher none"),
        ({"answer_weight": 3.0, "data": ["unmarked"]}, LandmarkError, "no corpus says which of its text is answers"),
        ({"answer_divergence_weight": 3.0, "data": ["unmarked"]}, LandmarkError, "no corpus says which of its text"),
        ({"teacher": "nowhere/at/all"}, LandmarkError, "cannot open the model nowhere/at/all: it is not there"),
    ],
)
def test_what_does_not_go_together(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        finetune(tmp_path / "run", **changes)
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    "changes", [{}, LORA, {"teacher": "none"}, {"softmax": "joint"}], ids=["whole", "adapters", "none", "joint"]
)
def test_a_dry_run_says_what_landmarks_and_teacher_take(tmp_path, capsys, changes):
    assert (
        run(FinetuneOptions(model="base", data=["asked"], output=tmp_path / "run", dry_run=True, **SHORT | changes))
        is None
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert ("7 + 1 tokens, which landmarks only choose" in shown) == ("softmax" in changes)
    assert "tokens a step 256 in 4 windows of 64" in shown and "landmark attention, blocks of 7 + 1" in shown
    assert ("for the teacher" in shown) == (changes != {"teacher": "none"}) and "memory, about" in shown
    assert ("of them trained" in shown) == (changes == LORA)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path):
    tiny_decoder("llama", vocab_size=320).save_pretrained(tmp_path / "stranger")
    byte_tokenizer(ids={"<|im_start|>": 270}).save_pretrained(tmp_path / "stranger")
    with pytest.raises(LandmarkError, match="--teacher .*stranger is of another tokenizer: '.*' is .* in the model"):
        finetune(tmp_path / "run", teacher=str(tmp_path / "stranger"))


def test_a_teacher_that_cannot_read_all_of_its_tokens_is_refused(tmp_path):
    tiny_decoder("llama", vocab_size=200).save_pretrained(tmp_path / "short")
    tiny_tokenizer().save_pretrained(tmp_path / "short")
    with pytest.raises(LandmarkError, match="short cannot be the teacher: .* its embedding 200 rows; take"):
        finetune(tmp_path / "run", teacher=str(tmp_path / "short"))


def test_a_teacher_is_opened_before_text_is_tokenized(tmp_path):
    (tmp_path / "cats.txt").write_text("the cats sat on the mats. " * 100)
    with pytest.raises(LandmarkError, match="the model ./nobody: it is not there"):
        finetune(tmp_path / "run", teacher="./nobody", data=[str(tmp_path / "cats.txt")])
    assert not (tmp_path / "run/data").exists()


@pytest.mark.parametrize(("positions", "reach"), [(64, ""), (40, ", which is asked about the first 40 tokens of each")])
def test_what_the_teacher_is_asked_about_is_said_where_windows_go_beyond(positions, reach):
    teacher = Teacher(tiny_decoder("llama", max_position_embeddings=positions))
    said = Distillation(teacher, "self", landmark_token_id=300).said(text_length=56)
    assert said.startswith(f"teacher: the model as it was{reach}") and ("asked about" in said) == bool(reach)


@pytest.mark.parametrize(("kind", "name"), [(DistributedType.FSDP, "FSDP 1"), (DistributedType.DEEPSPEED, "DeepSpeed")])
def test_a_launch_that_cannot_split_the_teacher_is_refused_with_one(kind, name):
    class Launched:
        distributed_type, is_fsdp2 = kind, False

    with pytest.raises(UsageError, match=f"--teacher self .* this launch is of {name}: set fsdp_version: 2 .* none"):
        check_launch(FinetuneOptions(model="base", data=["asked"]), Launched())
    check_launch(FinetuneOptions(model="base", data=["asked"], teacher="none"), Launched())
    Launched.is_fsdp2 = True
    check_launch(FinetuneOptions(model="base", data=["asked"]), Launched())


@pytest.mark.parametrize("format", [None, 2])
def test_a_recipe_that_an_earlier_run_saved_has_no_teacher(tmp_path, format):
    saved = finetune(tmp_path / "run", steps=1, teacher="other") / "recipe.yaml"
    assert load_recipe(saved, FinetuneOptions, "finetune")["teacher"] == "other"
    lines = [line for line in saved.read_text().splitlines() if line.partition(":")[0] not in ("teacher", "format")]
    (tmp_path / "earlier.yaml").write_text("\n".join(lines + ([f"format: {format}"] if format else [])))
    values = load_recipe(tmp_path / "earlier.yaml", FinetuneOptions, "finetune")
    assert values["teacher"] == "none" and values["sequence_length"] == (64 if format else 64 + 64 // 7)
    # One by hand means what the help says.
    (tmp_path / "by-hand.yaml").write_text("command: finetune\nmodel: base\ndata: asked\n")
    assert build(FinetuneOptions, load_recipe(tmp_path / "by-hand.yaml", FinetuneOptions, "finetune")).teacher == "self"


def test_what_answers_weighed_unasked_in_earlier_versions_asks_for_none(tmp_path):
    """Recipes that their runs saved say it, of data without answers too."""
    earlier = {"answer_weight": 1.0, "answer_divergence_weight": 0.0}
    output = finetune(tmp_path / "run", steps=1, data=["unmarked"], tasks_share=0.0, **earlier)
    assert len(records(output)) == 1 and not records(output, "answers_loss")


# The setting is what `accelerate launch --use_fsdp` has unless it is told otherwise.
LAUNCHES = {"processes": {}, "shards": FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}}


CURVES = "loss", "divergence", "answers_loss", "gradient_norm"


def launch(output, processes, changes, accumulation, flags=(), curves=(*CURVES, "gate", "hidden_states"), **changed):
    """The curves of a launch of so many processes."""
    options = SHORT | {"model": "base", "data": "asked", "output": output, "accumulation": accumulation}
    options |= {"answer_weight": 2.0, "answer_divergence_weight": 1.5, "text_weight": 0.1, "gate_weight": 0.5}
    options |= {"hidden_weight": 0.3} | changes
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    program = [FSDP_ON_CPU] if changed else ["-m", "landmark_cli"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *program]
    changed |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, *launcher, "finetune", *arguments, *flags]
    done = subprocess.run(command, env=os.environ | changed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.tensor([records(output, key) for key in curves])


@pytest.fixture(scope="module", params=[{}, {"teacher": "other"}, LORA], ids=["whole", "another", "adapters"])
def alone(request, place, tmp_path_factory):
    """Options, and the curves of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return request.param, launch(tmp_path_factory.mktemp("alone") / "run", 1, request.param, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAUNCHES)
def test_two_processes_learn_as_one(tmp_path, alone, kind):
    changes, one = alone
    assert_close_norm(launch(tmp_path / "run", 2, changes, 2, **LAUNCHES[kind]), one)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, LORA], ids=["whole", "adapters"])
def test_compiled_they_do_too(tmp_path, place, monkeypatch, changes):
    """Layers that are checkpointed, one copy a process or its share of them."""
    monkeypatch.chdir(place)
    changes, flags = changes | {"gate_weight": 0.0}, ("--compile", "--gradient-checkpointing")
    curves = *CURVES, "hidden_states"
    one = launch(tmp_path / "one", 1, changes, 4, curves=curves)
    for kind, environment in LAUNCHES.items():
        found = launch(tmp_path / kind, 2, changes, 2, flags, curves, **environment)
        assert_close_norm(found, one)
