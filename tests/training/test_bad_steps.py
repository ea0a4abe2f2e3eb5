"""Steps whose loss or gradient is not finite: they change nothing, they are counted, and nothing of them is saved."""

import math
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from landmark_cli.errors import LandmarkError
from landmark_cli.models.directory import save_model
from landmark_cli.training.finite import not_finite
from landmark_cli.training.optimizer import Schedule
from landmark_cli.training.publish import Publication
from tests.training.command import environment, records
from tests.training.test_processes import FSDP
from tests.training.tiny import RandomBatches, tiny_loop, tiny_model

SCHEDULE = Schedule("one-cycle", 1e-2, 8, 0.2)
# What a step of each kind multiplies: the embeddings, or the gradient of one weight.
KINDS = {
    "the loss is nan": ("loss", math.nan),
    "the loss is infinite": ("loss", math.inf),
    "the gradient is nan": ("gradient", math.nan),
    "the gradient is infinite": ("gradient", math.inf),
    "the norm is infinite": ("gradient", 1e30),
}


def spoil(loop, steps, kind="the loss is nan", micro_batch=0):
    """Have these steps of a loop go wrong in one micro-batch of each."""
    where, factor = KINDS[kind]
    model = loop.accelerator.unwrap_model(loop.module, keep_torch_compile=False).wrapped
    seen = [-1]

    def spoiled(tensor):
        bad = loop.step in steps and seen[0] % loop.settings.accumulation == micro_batch
        return tensor * factor if bad else tensor

    def count(module, inputs):
        seen[0] += 1

    model.model.embed_tokens.register_forward_pre_hook(count)
    if where == "loss":
        model.model.norm.register_forward_hook(lambda module, inputs, output: spoiled(output))
    else:
        model.model.layers[0].mlp.up_proj.weight.register_hook(spoiled)
    return loop


def state_of(loop):
    """The weights and all that the optimizer keeps, by name."""
    found = dict(loop.module.named_parameters())
    for number, state in enumerate(loop.optimizer.state.values()):
        found |= {f"{number} {name}": tensor for name, tensor in state.items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_same_state(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 10
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


class WithoutSomeSteps(RandomBatches):
    """Batches as if some had never been."""

    def __init__(self, rows, without):
        super().__init__(rows)
        self.without = without

    def batch(self, step, start, stop):
        left = [number for number in range(100) if number not in self.without]
        return super().batch(left[step], start, stop)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_bad_step_is_as_if_it_had_not_been(tmp_path, kind, micro_batch):
    bad = {0, 3, 4}
    loop = spoil(tiny_loop(tmp_path / "bad", steps=8, schedule=SCHEDULE), bad, kind, micro_batch)
    loop.run()
    without = tiny_loop(tmp_path / "without", steps=5, schedule=SCHEDULE)
    without.batches = WithoutSomeSteps(8, bad)
    without.run()
    assert_same_state(state_of(loop), state_of(without))
    assert records(tmp_path / "bad", "skipped_steps") == [1, 1, 1, 2, 3, 3, 3, 3]
    kept = [loss for loss in records(tmp_path / "bad") if loss is not None]
    assert kept == records(tmp_path / "without") and len(kept) == 5
    rates = records(tmp_path / "bad", "learning_rate")
    assert [rates[step] for step in range(8) if step not in bad] == records(tmp_path / "without", "learning_rate")


def test_the_mean_loss_between_two_records_is_that_of_the_steps_that_counted(tmp_path, capsys):
    spoil(tiny_loop(tmp_path / "all", steps=4, log_every=4), {1, 2}).run()
    spoil(tiny_loop(tmp_path / "each", steps=4), {1, 2}).run()
    mean = records(tmp_path / "each")[3]
    assert records(tmp_path / "all") == [records(tmp_path / "each")[0], pytest.approx(mean, rel=1e-6)]
    assert "2 of the 3 steps up to step 4 changed nothing: their loss or gradient" in capsys.readouterr().err
    assert "NaN" not in (tmp_path / "each/metrics.jsonl").read_text()


def test_a_run_stops_after_so_many_in_a_row_and_names_a_checkpoint_that_is_good(tmp_path):
    """Finiteness is no matter of what is logged, and what is kept is never what is bad."""
    loop = tiny_loop(tmp_path, steps=40, log_every=20, save_every=1, keep=2, bad_steps=4)
    spoil(loop, {2, 3, 5, *range(7, 40)})
    with pytest.raises(LandmarkError, match=r"of 4 steps in a row was not finite, up to step 11;") as raised:
        loop.run()
    newest = tmp_path / "checkpoints/step-00000010"
    assert f"Try a lower --lr, a longer --warmup or --clip 1. The last good checkpoint is {newest}" in str(raised.value)
    for path in (tmp_path / "checkpoints").iterdir():
        assert not_finite(load_file(path / "model.safetensors").items()) is None
    assert loop.resume() and loop.step == 10


def test_bad_steps_that_are_not_in_a_row_end_no_run(tmp_path):
    spoil(tiny_loop(tmp_path, steps=9, bad_steps=2), {1, 3, 5, 7}).run()
    assert records(tmp_path, "skipped_steps")[-1] == 4


def test_a_run_of_which_no_step_counted_is_an_error(tmp_path):
    with pytest.raises(LandmarkError, match="the loss or gradient of all 3 steps was not finite"):
        spoil(tiny_loop(tmp_path, steps=3), {0, 1, 2}).run()


def test_a_run_resumed_between_bad_steps_takes_the_same_path(tmp_path):
    options = {"steps": 8, "bad_steps": 3, "schedule": SCHEDULE}
    through = spoil(tiny_loop(tmp_path / "through", **options), {1, 3, 4})
    through.run()
    cut = spoil(tiny_loop(tmp_path / "cut", save_every=4, **options), {1, 3, 4})
    cut.micro_batches = lambda: (batches for _, batches in zip(range(4), type(cut).micro_batches(cut), strict=False))
    cut.run()
    resumed = spoil(tiny_loop(tmp_path / "cut", model=tiny_model(seed=9), **options), {1, 3, 4})
    assert resumed.resume() and resumed.step == 4
    assert resumed.update.skipped.read() == {"total": 2, "in_a_row": 1, "longest": 1}
    resumed.run()
    assert_same_state(state_of(resumed), state_of(through))
    for key in ("loss", "learning_rate", "gradient_norm", "skipped_steps"):
        assert records(tmp_path / "cut", key) == records(tmp_path / "through", key)


class Waits(TorchDispatchMode):
    """Records the operations that hand a tensor's value to Python, or let it decide a shape."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"):
            self.seen.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("bad", [set(), {2}], ids=["good", "bad"])
def test_no_step_waits_for_the_device(tmp_path, bad):
    # The definition of landmark attention asks a tensor for a number; its kernels do not.
    model = tiny_model(landmark_freq=None, landmark_token_id=None)
    loop = spoil(tiny_loop(tmp_path, steps=9, model=model), bad)
    parameters, micro_batches = list(loop.module.parameters()), loop.micro_batches()
    for loop.step in range(4):
        batches = next(micro_batches)
        with Waits() as waits:
            loop.train_step(batches, parameters)
        # The first step looks up its learning rates.
        assert waits.seen == (["_local_scalar_dense"] if loop.step == 0 else [])
    micro_batches.close()
    with Waits() as waits:
        float(torch.ones(()))
    assert waits.seen == ["_local_scalar_dense"]


@pytest.mark.parametrize("of", ["a weight", "the optimizer"])
def test_what_is_not_finite_is_not_saved(tmp_path, of):
    loop = tiny_loop(tmp_path, steps=2)
    loop.run()
    good = loop.checkpoints.save(1)
    weight = loop.module.wrapped.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        (weight if of == "a weight" else loop.optimizer.state[weight]["exp_avg_sq"])[3, 3] = math.inf
    name = r"wrapped.model.layers.1.mlp.up_proj.weight" if of == "a weight" else "the optimizer's exp_avg_sq of"
    with pytest.raises(LandmarkError, match=f"the checkpoint of step 2 is not saved, for {name}.*is {good}"):
        loop.checkpoints.save(2)
    with pytest.raises(LandmarkError, match=f"no model is written to .* is not finite: try .*is {good}"):
        Publication(loop.module.wrapped, tmp_path, lambda directory: None).publish(loop)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [good.name]
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "model.safetensors").exists()


def test_weights_too_large_for_the_dtype_they_are_saved_in_are_not_published(tmp_path):
    loop = tiny_loop(tmp_path, steps=1)
    loop.run()
    with torch.no_grad():
        loop.module.wrapped.model.layers[0].mlp.down_proj.weight[0, 0] = 1e6

    def save_halves(model, directory, weights):
        save_model(model, directory, {name: one.half() for name, one in weights.items()})

    publication = Publication(loop.module.wrapped, tmp_path, lambda directory: None, save_halves)
    with pytest.raises(LandmarkError, match=r"model.layers.0.mlp.down_proj.weight would not be finite as it is saved"):
        publication.publish(loop)
    assert not (tmp_path / "config.json").exists()


TWO_PROCESSES = """
import os, sys
from pathlib import Path
import torch
from accelerate.state import PartialState
from tests.training.fsdp_on_cpu import begin_as_on_gpus
from tests.training.test_bad_steps import SCHEDULE, spoil
from tests.training.tiny import tiny_loop

if "ACCELERATE_USE_FSDP" in os.environ:
    PartialState.__init__ = begin_as_on_gpus
output, rank = Path(sys.argv[1]), os.environ["RANK"]
loop = tiny_loop(output, steps=8, batch_size=2, schedule=SCHEDULE, save_every=4)
# What goes wrong in one process is the others' bad step too.
spoil(loop, {3, 4} if rank == "1" else {0}, sys.argv[2])
loop.run()
counts = loop.update.skipped.read()
weights = loop.accelerator.get_state_dict(loop.module)
torch.save((counts, {name.removeprefix("module."): one for name, one in weights.items()}), output / f"{rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharded", "kind"),
    [(False, "the loss is nan"), (False, "the gradient is infinite"), (True, "the loss is nan")],
    ids=["loss", "gradient", "sharded"],
)
def test_a_step_is_skipped_by_all_processes_or_none(tmp_path, sharded, kind):
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    command = ["torchrun", "--nproc_per_node=2", tmp_path / "run.py", tmp_path / "two", kind]
    subprocess.run(command, env=environment(ACCELERATE_USE_CPU="true", **(FSDP if sharded else {})), check=True)
    first, second = (torch.load(tmp_path / f"two/{rank}.pt") for rank in range(2))
    assert first[0] == second[0] == {"total": 3, "in_a_row": 0, "longest": 2}
    if not sharded:
        assert_same_state(first[1], second[1])

    without = tiny_loop(tmp_path / "one", steps=5, schedule=SCHEDULE)
    without.batches = WithoutSomeSteps(8, {0, 3, 4})
    without.run()
    for name, parameter in without.module.named_parameters():
        torch.testing.assert_close(first[1][name], parameter.detach(), rtol=1e-4, atol=1e-5)
