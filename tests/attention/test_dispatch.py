"""Which backend runs where, that the user is told once, and that models enter through it."""

import pytest
import torch

from landmark_cli.attention import backends, dispatch
from landmark_cli.attention.backends import BACKENDS, Problem, choose
from landmark_cli.attention.dispatch import LandmarkLayout
from landmark_cli.attention.functional import landmark_attention
from landmark_cli.attention.kernels.hopper import support
from landmark_cli.attention.reference import landmark_attention as eager
from landmark_cli.errors import UsageError
from tests import goldens
from tests.closeness import assert_close_norm
from tests.models import test_gpt_goldens, test_llama_goldens

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    """Nothing chosen, nothing said, and no Hopper GPU, whose choices have tests of their own."""
    monkeypatch.delenv("LANDMARK_ATTENTION", raising=False)
    monkeypatch.setattr(support, "is_hopper", lambda device: False)
    backends._announce.cache_clear()


PLAIN = Problem("cuda", torch.bfloat16, 128, 64)


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu:1"])
def test_a_gpu_runs_triton_and_what_is_none_reads_blockwise(device, capsys):
    assert choose(PLAIN) == "triton"
    assert choose(PLAIN._replace(device=device)) == "eager"
    assert choose(PLAIN._replace(device=device, reading=True)) == "blockwise"
    said = capsys.readouterr().err
    assert "landmark attention: triton (on cuda)" in said and "landmark attention: eager" in said
    assert f"landmark attention: blockwise (on {device.partition(':')[0]})" in said
    assert choose(PLAIN) == "triton"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 288}, "head dim 288"),
        ({"block_size": 300}, "block_size is 300"),
        ({"device": "mps"}, "mps"),
        ({"reading": True, "differentiated": True}, "gradients"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_kernels_cannot_serve_runs_eager_and_says_why(given, reason, capsys):
    problem = PLAIN._replace(**given)
    assert choose(problem) == "eager"
    assert reason in capsys.readouterr().err
    with pytest.raises(ValueError, match=reason):
        choose(problem, "triton")


def test_the_environment_and_the_argument_choose(monkeypatch):
    monkeypatch.setenv("LANDMARK_ATTENTION", "eager")
    assert choose(PLAIN) == "eager"
    assert choose(PLAIN, "triton") == "triton"
    # Its name until it had company.
    assert choose(PLAIN, "fused") == "triton"
    monkeypatch.setenv("LANDMARK_ATTENTION", "flash")
    with pytest.raises(
        UsageError, match='LANDMARK_ATTENTION=flash: .* "hopper", "triton", "blockwise", "eager"; .flash. was asked'
    ):
        choose(PLAIN)
    monkeypatch.setenv("LANDMARK_ATTENTION", "hopper")
    with pytest.raises(UsageError, match="LANDMARK_ATTENTION=hopper: .* compute capability 9.0"):
        choose(PLAIN)


def test_the_table_is_whole():
    """Every backend has a name of its own, and reads or leaves that to another; the last one serves everything."""
    for name, backend in BACKENDS.items():
        assert backend.name == name and (backend.forward is None) == (backend.backward is None)
        assert backend.reads_as is None or BACKENDS[backend.reads_as].read is not None
    hardest = Problem("mps", torch.float64, 3, None, True, True, True, True, True, True, True)
    *_, last = BACKENDS.values()
    assert last.meant_for("mps") and last.why_not(hardest) is None
    assert all(backend.why_not(hardest) for backend in BACKENDS.values() if backend is not last)


@pytest.mark.parametrize(
    ("argument", "words"),
    [("softcap", "softcap bounds the logits"), ("sinks", "sinks give the outer softmax logits of their own")],
)
@pytest.mark.parametrize(
    ("backend", "reading", "who"),
    [("blockwise", True, "reading block by block"), ("hopper", False, "the Hopper kernels")],
)
def test_arguments_that_only_some_backends_know(backend, reading, who, argument, words):
    problem = Problem("cpu", torch.float32, 16, 5, reading=reading, **{argument: True})
    assert BACKENDS[backend].why_not(problem) == f"{words}, which {who} cannot"
    assert BACKENDS["triton"].why_not(problem) is None
    assert choose(problem) == "eager"


def test_one_softmax_over_all_text_is_not_for_hopper():
    problem = PLAIN._replace(joint=True)
    assert BACKENDS["hopper"].why_not(problem).startswith("joint asks for one softmax over all text")
    assert choose(problem) == "triton"


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("argument", ["dropout_p", "context_miss_key"])
def test_what_joint_excludes_is_named(argument, backend):
    q, k, v = (torch.randn(1, 2, 12, 16) for _ in range(3))
    given = {"dropout_p": 0.1, "dropout_seed": 1} if argument == "dropout_p" else {argument: torch.randn(1, 2, 1, 16)}
    with pytest.raises(ValueError, match=argument):
        landmark_attention(q, k, v, 5, joint=True, backend=backend, **given)


@pytest.mark.parametrize("argument", ["landmark_mask", "context_miss_key"])
def test_arguments_that_only_the_definition_knows(argument):
    q, k, v = (torch.randn(1, 2, 12, 16) for _ in range(3))
    given = {"landmark_mask": torch.arange(12)[None] % 5 == 4} if argument == "landmark_mask" else {"block_size": 5}
    if argument == "context_miss_key":
        given["context_miss_key"] = torch.randn(1, 2, 1, 16)
    assert_close_norm(landmark_attention(q, k, v, **given), eager(q, k, v, **given))
    with pytest.raises(ValueError, match=argument):
        landmark_attention(q, k, v, **given, backend="triton")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_model_compiles_with_it_in_one_graph(backend, dynamic):
    class Module:
        layer_idx = 0
        config = type("Config", (), {"landmark_freq": 6})()

    def forward(q, k, v):
        layout = LandmarkLayout(backend=backend)
        return dispatch.landmark_attention_forward(Module, q, k, v, None, landmark_layout=layout)[0] * 2

    compiled = torch.compile(forward, fullgraph=backend == "triton", backend="aot_eager", dynamic=dynamic)
    for tokens in (12, 15) if dynamic else (12,):
        q, k, v = (torch.randn(1, 2, tokens, 16) for _ in range(3))
        assert_close_norm(compiled(q, k, v), 2 * eager(q, k, v, block_size=7).transpose(1, 2))


@pytest.mark.parametrize(
    ("device", "tolerance"),
    # Products of float32 are done in three parts of fewer bits on a GPU, and in another order.
    [pytest.param("cpu", 1e-5, id="interpreted"), pytest.param("cuda", 1e-4, marks=pytest.mark.gpu, id="gpu")],
)
@pytest.mark.parametrize(
    "name",
    # The second is as the first, but for the size of a block, and so are the Llama's.
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("gpt_forward_1", "llama_forward_51") else ())
        for name in goldens.names("gpt_forward_*") + goldens.names("llama_forward_*")
    ],
)
def test_the_authors_outputs_through_the_triton_kernels(name, device, tolerance, monkeypatch, capsys):
    monkeypatch.setenv("LANDMARK_ATTENTION", "triton")
    room = test_gpt_goldens if name.startswith("gpt") else test_llama_goldens
    room.check_forward(name, device, tolerance)
    assert "landmark attention: triton" in capsys.readouterr().err
