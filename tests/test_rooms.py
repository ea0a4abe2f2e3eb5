"""Which room of the house may take from which: a lower one from none above it, kernels from kernels/common alone,
nothing in a circle, and Triton with kernels alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import landmark_cli

ROOT = Path(landmark_cli.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
KERNELS = sorted(path.parent.name for path in (ROOT / "attention" / "kernels").glob("*/__init__.py"))

# What each folder of the package takes from others. Modules beside the folders take from none of these.
TAKES = {
    "attention": set(),
    "data": set(),
    "weight_diff": set(),
    "models": {"attention", "data", "weight_diff"},
    "inference": {"attention", "data", "models"},
    "evaluation": {"data", "inference", "models"},
    "training": {"attention", "data", "models"},
    "serving": {"inference", "models"},
    "commands": {"data", "models", "inference", "evaluation", "training", "serving", "weight_diff"},
}
EXCEPTIONS = {
    ("cli", "commands"): "it runs them",
    ("evaluation.harness", "commands.models"): "it is a command of its own, that of another program",
    ("models.calls", "inference.calls"): "transformers' generate and forward, once they are called, read with memory",
    ("training.validation", "evaluation.score"): "what a loss is as a perplexity, and how well answers are predicted",
    ("training.setup", "evaluation.score"): "what an evaluation adds up, of the answers alone too",
}
# Kernels that are not of attention: Triton is imported with them, and they where they are called.
KERNELS_ELSEWHERE = {
    f"landmark_cli.{name}"
    for name in (
        "evaluation.fused_score",
        "models.row_products",
        "models.step_kernels",
        "training.fused_cross_entropy",
        "training.fused_distillation",
        "training.fused_gate",
    )
}
# Functions that import, when they are called, what they choose from.
TABLES = {
    ("landmark_cli.inference.readers", f"landmark_cli.inference.{name}")
    for name in ("block_reader", "recurrent", "window")
}


def imported(module: str, everywhere: bool = True) -> set[str]:
    """The modules of this project that a module imports. everywhere: inside functions too; else when it is imported
    itself, and then with the packages that these are in, whose `__init__` runs first."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body, everywhere):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # What is imported may be a module itself.
            found |= {f"{name}.{alias.name}" if f"{name}.{alias.name}" in MODULES else name for alias in node.names}
    if not everywhere:
        found |= {name.rsplit(".", n)[0] for name in found for n in range(1, name.count(".") + 1)}
        found = {name for name in found if not f"{module}.".startswith(f"{name}.")}
    return found & MODULES.keys()


def statements(body: list[ast.stmt], everywhere: bool) -> Iterator[ast.stmt]:
    """All that may run: not what is for type checkers only, and what stands in functions only if `everywhere`."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = [child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.excepthandler))]
            yield from statements(inside, everywhere)


def within(module: str, room: str) -> bool:
    return f"{module}.".startswith(f"landmark_cli.{room}.")


@pytest.mark.parametrize("package", KERNELS)
def test_kernels_import_nothing_but_themselves_and_common(package):
    files = [module for module in MODULES if within(module, f"attention.kernels.{package}")]
    assert len(KERNELS) > 3 and len(files) > 3
    for module in files:
        for name in imported(module):
            assert any(within(name, f"attention.kernels.{room}") for room in (package, "common")), (module, name)


def test_a_room_takes_from_no_room_above_it():
    used = set()
    for module in MODULES:
        own = next((room for room in TAKES if within(module, room)), None)
        for name in imported(module):
            room = next((room for room in TAKES if within(name, room)), None)
            if room in (None, own) or (own and room in TAKES[own]):
                continue
            exception = next(((a, b) for a, b in EXCEPTIONS if within(module, a) and within(name, b)), None)
            assert exception, f"{module} imports {name}"
            used.add(exception)
    assert used == set(EXCEPTIONS)
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} == set(TAKES)


@pytest.mark.parametrize("everywhere", [False, True], ids=["when imported", "late imports too"])
def test_no_module_imports_itself_by_way_of_others(everywhere):
    edges = {
        module: {name for name in imported(module, everywhere) if (module, name) not in TABLES} for module in MODULES
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for name in edges[module]:
                visit(name, (*way, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def is_of_kernels(module: str) -> bool:
    return within(module, "attention.kernels") or module in KERNELS_ELSEWHERE


def imports_triton(module: str) -> bool:
    for node in statements(ast.parse(MODULES[module].read_text(encoding="utf-8")).body, everywhere=False):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(name.partition(".")[0] == "triton" for name in names):
            return True
    return False


def test_whoever_does_not_want_kernels_imports_no_triton():
    """PyTorch for a CPU comes without it."""
    found = {module for module in MODULES if imports_triton(module)}
    assert len(found) > 30 and KERNELS_ELSEWHERE <= found
    while more := {module for module in MODULES.keys() - found if imported(module, everywhere=False) & found}:
        found |= more
    assert not [module for module in found if not is_of_kernels(module)]
