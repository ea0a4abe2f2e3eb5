"""Work of the main process alone: one process goes through it, and of several the others hear of how it ended."""

import subprocess
import sys

import pytest

from landmark_cli.errors import LandmarkError, Stopped
from landmark_cli.training.parts import in_parts
from tests.training.command import environment

ENDS = {
    "done": None,
    "failed": LandmarkError("no room"),
    "stopped": Stopped("kept", 15),
    "broken": ValueError("a fault"),
}
SCRIPT = """
import sys
from accelerate import PartialState
from landmark_cli.errors import LandmarkError, Stopped
from landmark_cli.training.parts import in_parts
from tests.training.test_parts import ENDS, work

state = PartialState(cpu=True)
for name in ENDS:
    seen = []
    try:
        in_parts(lambda: work(name, seen))
        said = "done"
    except Stopped as error:
        said = f"stopped {error} {error.exit_code}"
    except Exception as error:
        said = f"{type(error).__name__} {error}"
    print(f"process {state.process_index} {name}: {said}, {len(seen)} parts", flush=True)
"""


def work(end, seen):
    for number in range(3):
        seen.append(number)
        yield
    if ENDS[end] is not None:
        raise ENDS[end]


@pytest.mark.parametrize("end", ENDS)
def test_one_process_goes_through_the_work(fresh_accelerator, end):
    seen = []
    if ENDS[end] is None:
        in_parts(lambda: work(end, seen))
    else:
        with pytest.raises(type(ENDS[end]), match=str(ENDS[end])):
            in_parts(lambda: work(end, seen))
    assert seen == [0, 1, 2]


@pytest.mark.slow
def test_all_processes_hear_how_it_ended(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    expected = {"done": "done", "failed": "LandmarkError no room", "stopped": "stopped kept 143"}
    for name, said in expected.items():
        assert f"process 0 {name}: {said}, 3 parts" in done.stdout
        assert f"process 1 {name}: {said}, 0 parts" in done.stdout
    assert "process 0 broken: ValueError a fault, 3 parts" in done.stdout
    assert "process 1 broken: LandmarkError a fault, 0 parts" in done.stdout
