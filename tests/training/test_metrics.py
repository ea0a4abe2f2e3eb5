"""What a run measures: throughput without pauses, FLOPs by the book, a metrics file that survives being killed."""

import json
import math

import pytest
import torch

from landmark_cli.attention.window import WindowSettings
from landmark_cli.errors import LandmarkError
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM
from landmark_cli.training import metrics
from landmark_cli.training.estimate import estimate
from landmark_cli.training.hidden_states import hidden_states_loss
from landmark_cli.training.metrics import Meter, flops_per_token, peak_flops, progress_fields
from landmark_cli.training.metrics_file import MetricsFile
from tests.training.tiny import tiny_model


def test_throughput_leaves_pauses_out(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    meter = Meter(step=10, steps=50, tokens=1000, flops=2e9, peak=4e12)
    clock[0] += 6.0
    with meter.pause():
        clock[0] += 30.0
    clock[0] += 4.0
    reading = meter.read(15)
    assert reading == pytest.approx(
        {"seconds_per_step": 2.0, "tokens_per_second": 500.0, "seconds_left": 70.0, "mfu": 0.25}
    )
    clock[0] += 1.0
    assert meter.read(16)["seconds_per_step"] == pytest.approx(1.0)


def test_flops_of_the_papers_model():
    with torch.device("meta"):
        model = GPTForCausalLM(GPTConfig())
    matrices = 12 * 12 * 1024**2 + 50304 * 1024
    assert flops_per_token(model, 512) == 6 * matrices + 6 * 12 * 1024 * 512


def test_frozen_weights_cost_no_gradient():
    model = tiny_model()
    full = flops_per_token(model, 20)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert full - flops_per_token(model, 20) == 2 * 4 * 16 * 16


def test_only_a_known_chip_has_a_peak(monkeypatch):
    assert peak_flops(torch.device("cpu"), "bf16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), "bf16") == 989e12
    assert peak_flops(torch.device("cuda"), "fp32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert peak_flops(torch.device("cuda"), "fp16") == 756e12


def test_rewinding_drops_later_records_and_half_a_line(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        file.append({"step": step})
    with file.path.open("a") as stream:
        stream.write('{"step": 6, "lo')
    file.rewind(3)
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [1, 2, 3]
    file.append({"step": 4})
    assert len(file.path.read_text().splitlines()) == 4


def test_damaged_lines_are_left_out_and_counted(tmp_path, capsys):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 8):
        file.append({"step": step, "loss": 2.5 / step, "learning_rate": math.nan})
    lines = file.path.read_text().splitlines()
    for number, damaged in enumerate(['{"loss": 1}', "[1]", '{"step": "2"}', "\x00", lines[4].replace("0.5", "0.7")]):
        lines[number] = damaged
    file.path.write_text("\n".join([*lines, '{"step": 6, "written by": "an earlier version"}', "{" * 1000]) + "\n")
    file.rewind(6)
    kept = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [record["step"] for record in kept] == [6, 6] and kept[0]["loss"] == 2.5 / 6
    assert f"{file.path}: 6 damaged lines left out" in capsys.readouterr().err
    file.rewind(6)
    assert capsys.readouterr().err == "" and len(file.path.read_text().splitlines()) == 2


def test_metrics_that_cannot_be_written_say_so(tmp_path):
    with pytest.raises(LandmarkError, match=r"metrics\.jsonl cannot be written"):
        MetricsFile(tmp_path / "gone" / "metrics.jsonl").append({"step": 1})


def test_the_progress_line_shows_mfu_only_where_it_is_known():
    record = {
        "loss": 3.21,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5,
        "tokens_per_second": 330_000.0,
        "peak_memory": 8_100_000_000,
    }
    assert progress_fields(record) == {
        "loss": "3.2100",
        "lr": "1.00e-03",
        "grad": "0.50",
        "tok/s": "330k",
        "peak": "8.1 GB",
    }
    assert progress_fields(record | {"mfu": 0.394})["MFU"] == "39.4%"


def test_the_estimate_counts_state_exactly():
    with torch.device("meta"):
        model = GPTForCausalLM(GPTConfig())
    needs = estimate(model, batch_size=16, precision="bf16")
    assert needs.parameters == sum(p.numel() for p in model.parameters())
    assert needs.state == 16 * needs.parameters and needs.memory > needs.state
    assert estimate(model, 16, "fp32").memory > needs.memory


def test_the_estimate_counts_a_teacher_and_what_is_frozen():
    with torch.device("meta"):
        model, teacher = GPTForCausalLM(GPTConfig()), GPTForCausalLM(GPTConfig(n_layer=3))
    count, taught = (sum(p.numel() for p in which.parameters()) for which in (model, teacher))
    alone = estimate(model, 16, "bf16")
    beside = estimate(model, 16, "bf16", teacher=teacher)
    assert beside.state - alone.state == 2 * taught and beside.activations > alone.activations
    assert estimate(model, 16, "fp32", teacher=teacher).state == 16 * count + 4 * taught
    rows = model.get_input_embeddings().weight.numel()
    within = estimate(model, 16, "bf16", teacher=model, teacher_beside=False)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert within.state - alone.state == 2 * rows * (1 if tied else 2)
    # Without the fused loss the teacher's logits are held too.
    plain = [estimate(model, 16, "bf16", False, teacher=which).activations for which in (None, teacher)]
    assert plain[1] - plain[0] > 16 * model.config.trained_length * teacher.config.vocab_size * 2
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    some = estimate(model, 16, "bf16", frozen_bytes=0.5)
    assert some.trained == rows and some.state == 16 * rows + round((count - rows) / 2)
    assert some.checkpoint == 12 * rows


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_counts_hidden_states_that_are_compared(checkpointing):
    """As much as the loss keeps for its gradient, and what it compares with."""
    layers, rows, width, kept = 6, 512, 64, {}
    theirs = [torch.randn(1, rows, width) for _ in range(layers + 1)]
    ours = [torch.randn(1, rows, width, requires_grad=True) for _ in theirs]
    own = {state.untyped_storage().data_ptr() for state in (*ours, *theirs)}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = hidden_states_loss(ours, theirs, torch.ones(1, rows, dtype=torch.bool), lambda values: values.clone())
    taken = sum(size for place, size in kept.items() if place not in own) + sum(state.nbytes for state in theirs[1:])
    with torch.device("meta"):
        model = GPTForCausalLM(GPTConfig(n_layer=layers, n_embd=width, n_head=2))
    how = {"sequence_length": rows, "teacher": model, "checkpointing": checkpointing}
    off, on = (estimate(model, 1, "fp32", hidden_states=compared, **how) for compared in (False, True))
    assert loss.requires_grad and on.state == off.state
    assert on.activations - off.activations == pytest.approx(taken, rel=0.1)


def test_the_estimate_grows_with_the_window_and_not_with_its_square():
    with torch.device("meta"):
        model = GPTForCausalLM(GPTConfig(trained_length=1275, landmark_freq=50, n_embd=384, n_head=6))
    read = WindowSettings(1020, 51, 4)

    def needs(tokens, **settings):
        return estimate(model, 1, "bf16", sequence_length=tokens, **settings).activations

    short, long = (needs(tokens, read=read) for tokens in (1 << 16, 1 << 18))
    assert 3.5 < long / short < 4
    again = needs(1 << 18, read=read, checkpointing=True)
    assert again < needs(1 << 18, read=read) / 4
    assert needs(1 << 18) < long
    # Of each of the 12 layers, what went in; of one, all.
    assert again > 12 * (1 << 18) * 384 * 2
    # What was retrieved: bf16 outputs, 10 bytes of each block, a log-sum-exp.
    less = needs(1 << 18, read=read, checkpointing=True, keep_retrieved=False)
    assert again - less == 12 * (1 << 18) * (384 * 2 + 6 * (10 * 4 + 4))


@pytest.mark.parametrize(("tokens", "attended"), [(512, 512), (1275, 1275), (1 << 16, 1020 + 8 * 51)])
def test_operations_of_attention_are_those_of_what_is_seen(tokens, attended):
    with torch.device("meta"):
        model = GPTForCausalLM(GPTConfig(trained_length=1275, n_layer=2))
    read = WindowSettings(1020, 51, 4)
    assert flops_per_token(model, tokens, read) == flops_per_token(model, attended)


def test_the_estimate_knows_that_the_fused_loss_holds_a_piece_of_the_logits():
    with torch.device("meta"):
        model = GPTForCausalLM(GPTConfig())
    fused = [estimate(model, batch_size, "bf16").activations for batch_size in (32, 64)]
    plain = [estimate(model, batch_size, "bf16", fused_loss=False).activations for batch_size in (32, 64)]
    logits = 32 * 512 * model.config.vocab_size
    # Either batch takes several pieces already: only plain logits grow.
    assert (plain[1] - plain[0]) - (fused[1] - fused[0]) > 11 * logits
    assert fused[0] < plain[0] - 9 * logits
