"""`landmark finetune`: every kind of data, whole and by adapters, resumed and split, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, LlamaForCausalLM, T5Config

import landmark_cli
from landmark_cli import errors
from landmark_cli.cli import main
from landmark_cli.commands.finetune import FinetuneOptions, run
from landmark_cli.data.landmarks import insert_landmarks
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.generation import generate
from landmark_cli.inference.settings import SamplingSettings
from landmark_cli.models import decoders, store
from landmark_cli.options import find_recipe, load_recipe, recipe_names
from tests.awkward_tokenizers import byte_tokenizer
from tests.closeness import assert_close_norm
from tests.models.families import random_decoder, tiny_decoder, tiny_tokenizer
from tests.training.command import records, stop_behind

CHECKOUT = Path(landmark_cli.__file__).parent.parent
SHORT = {
    "teacher": "none",
    "landmark_freq": 7,
    "sequence_length": 32,
    "steps": 3,
    "eval_ruler": "none",
    "batch_size": 2,
    "accumulation": 2,
    "lr": 1e-2,
    "log_every": 1,
    "eval_every": 0,
    "device": "cpu",
}


def sentences(first: int, count: int) -> str:
    return " ".join(f"the {n} cats of {n * 7 % 31} houses sat on {n % 5} mats." for n in range(first, first + count))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model and texts in several forms."""
    root = tmp_path_factory.mktemp("finetune")
    tiny_decoder("llama", initializer_range=0.1).save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    (root / "cats.txt").write_text(sentences(0, 100))
    rows = [json.dumps({"content": sentences(n, 20)}) for n in range(0, 200, 20)]
    (root / "cats.jsonl").write_text("\n".join(rows))
    return root


@pytest.fixture(autouse=True)
def in_the_place(place, fresh_accelerator, monkeypatch):
    monkeypatch.chdir(place)


def finetune(output, **changes):
    run(FinetuneOptions(**(SHORT | {"model": "base", "data": ["cats.txt"], "output": Path(output)} | changes)))
    return Path(output)


def test_the_result_is_a_landmark_model_that_reads_on(place, tmp_path):
    output = finetune(tmp_path / "run", eval_every=3, top_k_blocks=2)
    losses = records(output)
    assert losses[-1] < losses[0] and len(records(output, "validation_loss")) == 1
    assert records(output, "tokens")[-1] == 3 * 4 * 32

    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model) is LlamaForCausalLM and model.config._attn_implementation == "landmark"
    settings = ("landmark_freq", "landmark_token_id", "trained_length", "top_k_blocks", "include_landmark_in_loss")
    assert [getattr(model.config, name) for name in settings] == [7, 258, 32, 2, False]
    opened, tokenizer = store.load(output, device="cpu")
    ids = tokenizer(sentences(50, 8), return_tensors="pt").input_ids[0]
    with torch.no_grad():
        whole = opened(insert_landmarks(ids, 7, 258)[None]).logits
    read = [chunk.logits for chunk in BlockReader(opened, top_k_blocks=100, chunk=30).read([ids])]
    assert_close_norm(torch.cat(read, 1)[0, -1], whole[0, -1])


def test_its_recipe_repeats_the_run(tmp_path):
    first = finetune(tmp_path / "first", steps=2, landmarks_in_loss=True, seed=4, lora_targets=None)
    with pytest.raises(SystemExit) as exit:
        main(["finetune", f"--recipe={first / 'recipe.yaml'}", "--device=cpu", f"--output={tmp_path / 'second'}"])
    assert exit.value.code == 0
    assert (tmp_path / "second/model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert AutoModelForCausalLM.from_pretrained(first).config.include_landmark_in_loss


def test_data_of_all_kinds(tmp_path):
    whole = finetune(tmp_path / "text", steps=1)
    prepared = str(whole / "data/0-cats-txt")
    again = finetune(tmp_path / "prepared", steps=1, data=[prepared])
    assert records(again) == records(whole) and not (again / "data").exists()
    mixed = finetune(
        tmp_path / "mixed", steps=1, data=["cats.jsonl", prepared], text_field="content", data_weights=[2.0, 1.0]
    )
    assert [path.name for path in (mixed / "data").iterdir()] == ["0-cats-jsonl"]
    with pytest.raises(LandmarkError, match="no text field .text., only the fields content"):
        finetune(tmp_path / "field", data=["cats.jsonl"])
    with pytest.raises(LandmarkError, match="no file or folder nowhere.txt"):
        finetune(tmp_path / "nowhere", data=["nowhere.txt"])


def test_resumed_it_is_the_same_run(tmp_path):
    whole = finetune(tmp_path / "whole", steps=4, save_every=2)
    part = tmp_path / "part"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("config.json", "model.safetensors", "step-00000004"))
    with pytest.raises(LandmarkError, match="--resume"):
        finetune(part, steps=4, save_every=2)
    shutil.copytree(whole / "checkpoints/step-00000002", part / "checkpoints/step-00000002", dirs_exist_ok=True)
    finetune(part, steps=4, save_every=2, resume=True)
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert records(part) == records(whole)
    with pytest.raises(LandmarkError, match="landmark_freq is 7 there and 14 here"):
        finetune(part, steps=4, landmark_freq=14, resume=True)


def test_it_is_resumed_by_its_directory_alone(tmp_path, monkeypatch):
    options = {"steps": 4, "save_every": 2, "landmarks_in_loss": True}
    whole, part = finetune(tmp_path / "whole", **options), tmp_path / "part"
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="the power"):
        stop_behind(patched, 3)
        finetune(part, **options)
    with pytest.raises(SystemExit) as exit:
        main(["finetune", "--resume", f"--output={part}", "--device=cpu"])
    assert exit.value.code == 0
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (part / "recipe.yaml").read_text() == (whole / "recipe.yaml").read_text()


def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--device cuda:7: there is no such device here"):
        finetune(tmp_path / "run", device="cuda:7")


@pytest.mark.parametrize("tied", [False, True])
def test_adapters(tmp_path, tied):
    base = tmp_path / "base"
    tiny_decoder("llama", initializer_range=0.1, tie_word_embeddings=tied).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    lora = {"model": str(base), "lora_rank": 4, "save_every": 2, "steps": 4}
    output = finetune(tmp_path / "adapters", **lora)
    assert records(output)[-1] < records(output)[0]
    assert (output / "adapter_model.safetensors").is_file() and not (output / "model.safetensors").exists()
    checkpoint = load_file(output / "checkpoints/step-00000004/model.safetensors")
    assert not any("base_layer" in name for name in checkpoint)

    with pytest.raises(LandmarkError, match="holds adapters only"):
        finetune(tmp_path / "again", model=str(output))

    merged = finetune(tmp_path / "merged", merge=True, **lora)
    assert sorted(path.name for path in merged.iterdir() if "adapter" in path.name) == []
    ids = torch.arange(1, 65)[None]
    plain = AutoModelForCausalLM.from_pretrained(merged)
    opened = store.load(output, device="cpu")[0]
    assert opened.name_or_path == opened.config.name_or_path == str(output)
    with torch.no_grad():
        assert_close_norm(plain(ids).logits, opened(ids).logits)
    assert plain.config.landmark_freq == 7 and plain.config.tie_word_embeddings == tied
    # The landmark was learned, and so was its part in the layers.
    before = load_file(base / "model.safetensors")
    after = load_file(merged / "model.safetensors")
    assert not torch.equal(after["model.embed_tokens.weight"][258], after["model.embed_tokens.weight"][257])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(after[name], before[name])

    shutil.rmtree(base)
    with pytest.raises(LandmarkError, match="holds adapters for the model .*/base, which is needed too"):
        store.load(output)


def test_adapters_resume(tmp_path):
    lora = {"lora_rank": 2, "lora_targets": ["q_proj", "v_proj"], "steps": 4, "save_every": 2}
    whole, part = finetune(tmp_path / "whole", **lora), tmp_path / "part"
    shutil.copytree(whole / "checkpoints/step-00000002", part / "checkpoints/step-00000002")
    finetune(part, resume=True, **lora)
    weights, again = (load_file(path / "adapter_model.safetensors") for path in (whole, part))
    assert weights.keys() == again.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    with pytest.raises(LandmarkError, match="--lora-targets: .*nothing_like_it"):
        finetune(tmp_path / "targets", lora_rank=2, lora_targets=["nothing_like_it"])


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    plain = finetune(tmp_path / "plain", steps=2)
    less = finetune(tmp_path / "less", steps=2, gradient_checkpointing=True)
    assert_close_norm(records(less), records(plain))


def test_the_weights_keep_their_dtype(tmp_path):
    model = tiny_decoder("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = {"model": str(tmp_path / "base"), "steps": 1}
    assert load_file(finetune(tmp_path / "a", **base) / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    wide = finetune(tmp_path / "b", save_dtype="float32", **base)
    assert load_file(wide / "model.safetensors")["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2, "merge": True}], ids=["whole", "merged"])
def test_the_weights_keep_a_dtype_that_no_config_names(tmp_path, changes):
    tiny_decoder("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    output = finetune(tmp_path / "run", model=str(tmp_path / "base"), steps=1, **changes)
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    def losses(name, processes, accumulation):
        options = SHORT | {"model": "base", "data": "cats.txt", "output": tmp_path / name, "accumulation": accumulation}
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m", "landmark_cli"]
        changes = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
        command = [sys.executable, *launcher, "finetune", *arguments]
        done = subprocess.run(command, env=os.environ | changes, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return records(tmp_path / name)

    assert_close_norm(losses("two", 2, 2), losses("one", 1, 4))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sequence_length": 15}, UsageError, "--sequence-length 15 is shorter than two blocks of --landmark-freq 7"),
        (
            {"sequence_length": 600},
            LandmarkError,
            "base has 512 positions, fewer than a window of 600 tokens: .*--sequence-length. of at most 512",
        ),
        ({"top_k_blocks": 3}, UsageError, "--top-k-blocks 3 leaves .* in a window of 4 blocks: .* at most 2"),
        ({"data_weights": [1.0, 2.0]}, UsageError, "--data-weights: 2 given for 1 of --data"),
        ({"merge": True}, UsageError, "--merge is for adapters: give --lora-rank too"),
        ({"four_bit": True}, UsageError, "--four-bit is for adapters"),
        ({"model": "nowhere/at/all"}, LandmarkError, "cannot open the model nowhere/at/all: it is not there"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        finetune(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "reason"), [(BertConfig(), "it is an encoder .bert"), (T5Config(), "it is an encoder-decoder .t5")]
)
def test_no_decoder(tmp_path, config, reason):
    config.save_pretrained(tmp_path / "other")
    with pytest.raises(LandmarkError, match=reason):
        finetune(tmp_path / "run", model=str(tmp_path / "other"))
    assert not (tmp_path / "run").exists()


def test_no_rotary_embedding(tmp_path):
    small = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    random_decoder(GPT2Config, small).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(LandmarkError, match="no rotary embedding but learned absolute positions .gpt2"):
        finetune(tmp_path / "run", model=str(tmp_path / "gpt2"))


@pytest.fixture
def gap(tmp_path):
    """A model whose tokenizer has 258 tokens, then two with other ids that it was trained with, and rows to spare."""
    model = tiny_decoder("llama", initializer_range=0.1, vocab_size=320, bos_token_id=0, eos_token_id=1)
    model.save_pretrained(tmp_path / "gap")
    tokenizer = byte_tokenizer(ids={"<|im_start|>": 270, "<|im_end|>": 279}, eos_token="<|im_end|>", pad_token=None)
    tokenizer.save_pretrained(tmp_path / "gap")
    return tmp_path / "gap"


def test_a_tokenizer_with_gaps_between_its_ids(gap, tmp_path):
    output = finetune(tmp_path / "run", model=str(gap), steps=1, lr=0.0)
    model, tokenizer = store.load(output, device="cpu")
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "[PAD]", "<landmark>"]) == [
        270,
        279,
        280,
        281,
    ]
    assert (model.config.landmark_token_id, model.config.vocab_size) == (281, 320)
    before, after = (load_file(directory / "model.safetensors") for directory in (gap, output))
    kept = [id for id in range(320) if id not in (280, 281)]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][kept], before[name][kept])
    (generation,) = generate(model, tokenizer, ["the cats <|im_end|> of"], SamplingSettings(max_new_tokens=20))
    # No id without a token is ever said.
    assert set(generation.tokens) <= {*range(258), 270, 279}


def test_a_tokenizer_that_would_not_come_back_is_refused_before_the_first_step(gap, tmp_path, monkeypatch):
    def added_as_transformers_does(tokenizer, names, behind=-1):
        tokenizer.add_tokens([AddedToken(name, special=True) for name in names], special_tokens=True)
        return tokenizer.convert_tokens_to_ids(names)

    monkeypatch.setattr(decoders, "add_tokens", added_as_transformers_does)
    with pytest.raises(LandmarkError, match="gap does not come back the same .*<landmark> is 261, not 281"):
        finetune(tmp_path / "run", model=str(gap))
    assert not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/data").exists()


def test_token_files_of_another_tokenizer(tmp_path):
    from landmark_cli.data.token_file_writer import TokenFileWriter
    from landmark_cli.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("gpt2")
    with TokenFileWriter(tmp_path / "data/train.bin", tokenizer, source="a test") as writer:
        for ids in tokenizer.encode_documents([sentences(0, 50)]):
            writer.add_document(ids)
    with pytest.raises(LandmarkError, match="prepared with the tokenizer gpt2, which is not that of base"):
        finetune(tmp_path / "run", data=[str(tmp_path / "data")])


@pytest.mark.parametrize(
    ("changes", "package", "extra"),
    [({"lora_rank": 2}, "peft", "lora"), ({"lora_rank": 2, "four_bit": True}, "bitsandbytes", "qlora")],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, changes, package, extra):
    def import_module(name):
        if name == package:
            raise ModuleNotFoundError(name=package)

    monkeypatch.setattr(errors.importlib, "import_module", import_module)
    with pytest.raises(LandmarkError, match=rf"the package {package}, .*landmark-cli\[{extra}\]"):
        finetune(tmp_path / "run", **changes)


def test_deepspeed_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(LandmarkError, match=r"landmark-cli\[deepspeed\]"):
        finetune(tmp_path / "run")


def test_the_recipe_of_the_authors_and_the_config_for_accelerate():
    distilled = ["results/gemma3-distilled", "results/smollm2-distilled-64k", "results/smollm2-distilled"]
    demo = ["demo/shipped-2", "demo/shipped-3"]
    assert recipe_names("finetune") == [*demo, "llama/finetune_7b", *distilled, "results/smollm2"]
    values = load_recipe("llama/finetune_7b", FinetuneOptions, "finetune")
    assert (values["sequence_length"], values["landmark_freq"], values["lr"], values["steps"]) == (
        512,
        63,
        2e-5,
        15_000,
    )
    with pytest.raises(UsageError):
        load_recipe("llama/fsdp_8gpu", FinetuneOptions, "finetune")
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(find_recipe("llama/fsdp_8gpu", "finetune")))
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == ("FSDP", 8, "bf16")
