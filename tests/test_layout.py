"""Imports go one way, and `kernels` is not a top-level module."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

import smi_fast

ROOT = Path(__file__).parent.parent
# a module may import from its own layer and those before it
LAYERS = (
    ("kernels",),
    ("checks", "config", "device", "plugins", "schedule", "storage"),
    ("model",),
    ("method", "images"),
    ("tuning",),
    ("engine",),
    ("datasets", "quantize", "distill"),
    ("cli", "__init__", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# datasets, quantize and distill are light: they know images and models, but no engine
NO_ENGINE = ("datasets", "quantize", "distill")
MOST_LINES, MOST_PARAMETERS = 350, 6


def sources() -> list[Path]:
    package = [path for path in (ROOT / "smi_fast").rglob("*.py") if "kernels" not in path.relative_to(ROOT).parts]
    return sorted(package) + sorted((ROOT / "kernels").rglob("*.py"))


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imported(path: Path) -> list[str]:
    """Modules of the package that a file imports, as dotted names."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    own = LEVEL[layer_of(path)]
    for name in imported(path):
        assert name.partition(".")[0] not in ("kernels", "benchmarks", "examples", "tests"), f"{path} imports {name}"
        if name.startswith("smi_fast."):
            layer = name.split(".")[1]
            assert LEVEL[layer] <= own, f"{path.name} imports {name}, which stands after it"
            assert layer != "engine" or layer_of(path) not in NO_ENGINE, f"{path.name} imports {name}"


def test_no_two_files_import_each_other() -> None:
    graph = {module_of(path): {name for name in all_imported(path)} for path in sources()}
    order, seen = list[str](), dict[str, bool]()

    def visit(module: str) -> None:
        assert seen.get(module, True), f"a circle of imports: {' -> '.join([*order, module])}"
        if module in seen or module not in graph:
            return
        seen[module] = False
        order.append(module)
        for other in sorted(graph[module] - {module}):
            visit(other)
        order.pop()
        seen[module] = True

    for module in graph:
        visit(module)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("smi_fast", *parts) if parts[0] == "kernels" else parts)


def all_imported(path: Path) -> set[str]:
    """As `imported`, with what may be a module of a package that is imported from; without the packages themselves."""
    names = set(imported(path))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_file_is_long() -> None:
    """But for single ops, whose parts stay together."""
    for path in [*sources(), *(ROOT / "benchmarks").rglob("*.py")]:
        if layer_of(path) != "kernels":
            assert len(path.read_text().splitlines()) <= MOST_LINES, path


def test_no_function_has_many_parameters() -> None:
    """But for Triton kernels and registered ops, which take tensors flat, and commands, whose options they are."""
    for path in [*sources(), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not is_exempt(node):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names = [each.arg for each in arguments if each.arg not in ("self", "cls")]
                names += [each.arg for each in (node.args.vararg, node.args.kwarg) if each]
                assert len(names) <= MOST_PARAMETERS, f"{path.name}:{node.lineno} {node.name}"


def is_exempt(node: ast.FunctionDef) -> bool:
    marks = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    return any(mark in marks for mark in ("triton.jit", "custom_op", "register_fake", "command"))


def test_kernels_import_torch_triton_and_their_siblings_only() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        for name in imported(path):
            standard = name.partition(".")[0] in sys.stdlib_module_names
            own = name.startswith(("torch", "triton", "smi_fast.kernels"))
            assert standard or own, f"{path.name} imports {name}"


def test_kernels_is_no_top_level_module() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "smi_fast" / "kernels").is_symlink()
    found = importlib.util.find_spec("kernels")
    # a checkout on sys.path shows the folder as a namespace package; an installed module would have a loader and origin
    assert found is None or found.origin is None
    assert importlib.util.find_spec("smi_fast.kernels.common.grid") is not None


def test_public_names() -> None:
    assert set(smi_fast.__all__) == {"InversionConfig", "Inverter", "SparseImages", "__version__", "load_model"}
    assert all(hasattr(smi_fast, name) for name in smi_fast.__all__)
