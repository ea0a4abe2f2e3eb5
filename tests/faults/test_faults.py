"""A few trials of each kind, as tests; `python -m tests.faults` does them all and prints the table."""

import pytest

from tests.faults import workplace
from tests.faults.harness import run_kinds
from tests.faults.kinds import KINDS
from tests.faults.table import failures_of

pytestmark = pytest.mark.faults
SEED = 0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    workplace.import_everything()
    root = tmp_path_factory.mktemp("faults") / "base"
    workplace.make(root)
    return root


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_promise_holds(kind, base, tmp_path):
    (result,) = run_kinds([kind], lambda kind: range(kind.quick), seed=SEED, base=base, scratch=tmp_path, jobs=1)
    if result.not_here:
        pytest.skip(result.not_here)
    assert result.trials >= kind.quick
    assert not result.failures, failures_of([result], SEED)
