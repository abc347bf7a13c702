from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from smi_fast.kernels.common import configs
from smi_fast.kernels.common.configs import Config
from smi_fast.kernels.common.dispatch import INTERPRETED, why_not_triton
from tests.kernels.cases import DEVICE, SEED


@pytest.fixture(scope="session", autouse=True)
def language_patched_once() -> Iterator[None]:
    """Have Triton's interpreter replace the functions of ``triton.language`` once per launch.

    By itself it does so again whenever one jit function calls another, to the same effect. That took more than half
    of the processor time of these tests.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patch_language, done = interpreter._patch_lang, set()

    def once(function: Callable[..., object]) -> Any:
        module = id(function.__globals__)
        if module in done:
            return None  # a call within a kernel does not use the result
        done.add(module)
        scope = patch_language(function)
        restore = scope.restore
        scope.restore = lambda: (restore(), done.clear())  # called by the launch when it ends
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use larger blocks under the interpreter, whose time depends on the number of programs.

    For tests of code that calls the kernels; those of the kernels themselves use the pinned configurations.
    """
    if INTERPRETED:
        for op in ("adam_update", "total_variation"):
            monkeypatch.setitem(configs.PINNED, op, {0: Config(1024, 4)})


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fresh memory holds NaN (or the largest integer), so that an element a kernel leaves out is seen."""
    if request.node.get_closest_marker("kernel") is None:
        yield
        return
    print(f"SMI_FAST_TEST_SEED={SEED}")  # shown where a test fails: set it to draw the same inputs again
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not_triton(torch.empty(0, device=DEVICE))
    for item in items:
        if reason and item.get_closest_marker("kernel"):
            item.add_marker(pytest.mark.skip(f"kernels do not run here: {reason}"))
