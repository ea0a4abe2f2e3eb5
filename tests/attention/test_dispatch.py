"""Which implementation runs where, that the user is told once, and that models enter through it."""

import pytest
import torch

from landmark_cli.attention import dispatch
from landmark_cli.attention.dispatch import LandmarkLayout, choose_implementation, landmark_attention
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
    dispatch._announce.cache_clear()


def test_a_gpu_runs_fused_and_a_cpu_eager(capsys):
    assert choose_implementation("cuda", torch.bfloat16, 128, 64) == "fused"
    assert choose_implementation("cpu", torch.bfloat16, 128, 64) == "eager"
    said = capsys.readouterr().err
    assert "landmark attention: fused" in said and "landmark attention: eager" in said
    assert choose_implementation("cuda", torch.bfloat16, 128, 64) == "fused"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("cuda", torch.float64, 128, 64), "float64"),
        (("cuda", torch.bfloat16, 288, 64), "head dim 288"),
        (("cuda", torch.bfloat16, 128, 300), "block_size is 300"),
        (("mps", torch.bfloat16, 128, 64), "mps"),
    ],
)
def test_what_the_kernels_cannot_serve_runs_eager_and_says_why(given, reason, capsys):
    assert choose_implementation(*given) == "eager"
    assert reason in capsys.readouterr().err
    with pytest.raises(ValueError, match=reason):
        choose_implementation(*given, requested="fused")


def test_the_environment_and_the_argument_choose(monkeypatch):
    monkeypatch.setenv("LANDMARK_ATTENTION", "eager")
    assert choose_implementation("cuda", torch.bfloat16, 128, 64) == "eager"
    assert choose_implementation("cuda", torch.bfloat16, 128, 64, requested="fused") == "fused"
    monkeypatch.setenv("LANDMARK_ATTENTION", "flash")
    with pytest.raises(UsageError, match="LANDMARK_ATTENTION=flash"):
        choose_implementation("cuda", torch.bfloat16, 128, 64)
    monkeypatch.setenv("LANDMARK_ATTENTION", "hopper")
    with pytest.raises(UsageError, match="LANDMARK_ATTENTION=hopper: .* compute capability 9.0"):
        choose_implementation("cuda", torch.bfloat16, 128, 64)


@pytest.mark.parametrize("argument", ["landmark_mask", "context_miss_key"])
def test_arguments_that_only_the_definition_knows(argument):
    q, k, v = (torch.randn(1, 2, 12, 16) for _ in range(3))
    given = {"landmark_mask": torch.arange(12)[None] % 5 == 4} if argument == "landmark_mask" else {"block_size": 5}
    if argument == "context_miss_key":
        given["context_miss_key"] = torch.randn(1, 2, 1, 16)
    assert_close_norm(landmark_attention(q, k, v, **given), eager(q, k, v, **given))
    with pytest.raises(ValueError, match=argument):
        landmark_attention(q, k, v, **given, implementation="fused")


@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_a_model_compiles_with_it_in_one_graph(implementation):
    class Module:
        layer_idx = 0
        config = type("Config", (), {"landmark_freq": 6})()

    def forward(q, k, v):
        layout = LandmarkLayout(implementation=implementation)
        return dispatch.landmark_attention_forward(Module, q, k, v, None, landmark_layout=layout)[0] * 2

    q, k, v = (torch.randn(1, 2, 12, 16) for _ in range(3))
    compiled = torch.compile(forward, fullgraph=implementation == "fused", backend="aot_eager")
    assert_close_norm(compiled(q, k, v), 2 * eager(q, k, v, block_size=7).transpose(1, 2))


@pytest.mark.parametrize(
    ("device", "tolerance"),
    # Products of float32 are done in three parts of fewer bits on a GPU, and in another order.
    [pytest.param("cpu", 1e-5, id="interpreted"), pytest.param("cuda", 1e-4, marks=pytest.mark.gpu, id="gpu")],
)
@pytest.mark.parametrize("name", goldens.names("gpt_forward_*") + goldens.names("llama_forward_*"))
def test_the_authors_outputs_through_the_fused_kernels(name, device, tolerance, monkeypatch, capsys):
    monkeypatch.setenv("LANDMARK_ATTENTION", "fused")
    room = test_gpt_goldens if name.startswith("gpt") else test_llama_goldens
    room.check_forward(name, device, tolerance)
    assert "landmark attention: fused" in capsys.readouterr().err
