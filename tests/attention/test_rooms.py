"""Which room of the attention floor may take from which: kernels from kernels/common alone, and nothing in a circle."""

import ast
from pathlib import Path

import pytest

import landmark_cli.attention

ROOT = Path(landmark_cli.attention.__file__).parent
MODULES = {path: ".".join(path.relative_to(ROOT.parent.parent).with_suffix("").parts) for path in ROOT.rglob("*.py")}


def imported(path: Path, everywhere: bool) -> set[str]:
    """The modules of this project that a file imports: full names. everywhere: inside functions too."""
    module = MODULES[path].removesuffix(".__init__")
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter_top_level(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # What is imported may be a module itself.
            found |= {f"{name}.{alias.name}" if known(f"{name}.{alias.name}") else name for alias in node.names}
    return {name for name in found if name.startswith("landmark_cli")}


def iter_top_level(tree: ast.Module):
    """All but what stands in functions, which is imported when they are called."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def known(name: str) -> bool:
    path = ROOT.parent.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("package", ["common", "training", "hopper", "reading"])
def test_kernels_import_nothing_but_themselves_and_common(package):
    allowed = {f"landmark_cli.attention.kernels.{name}" for name in {package, "common"}}
    files = list((ROOT / "kernels" / package).glob("*.py"))
    assert len(files) > 3
    for path in files:
        for name in imported(path, everywhere=True):
            assert any(name == room or name.startswith(f"{room}.") for room in allowed), f"{path.name} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    """Inside functions too: what is imported late is imported all the same."""
    edges = {MODULES[path].removesuffix(".__init__"): imported(path, everywhere=True) for path in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for name in edges.get(module, ()):
                visit(name, (*way, module))
            done.add(module)

    for module in edges:
        visit(module, ())
