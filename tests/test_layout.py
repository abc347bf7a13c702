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
    ("checks", "config", "plugins", "schedule", "storage"),
    ("model",),
    ("method", "images", "priors"),
    ("engine",),
    ("tuning",),
    ("datasets", "quantize", "distill"),
    ("cli", "__init__", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


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
            assert LEVEL[name.split(".")[1]] <= own, f"{path.name} imports {name}, which stands after it"


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
