from collections.abc import Iterator

import pytest

from tests.offline_cuda.recorder import Recorder, is_present
from tests.offline_cuda.scenarios import collect


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-tables", action="store_true", help="write the tables of tests/offline_cuda anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # last, since torch 2.11 gives no memory back to a device any more once a capture has failed
    items.sort(key=lambda item: item.path.name == "test_planted.py")


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """The stand-in, with nothing left in it by the tests before; each test under it asks for this."""
    if not is_present():
        pytest.skip("runs on the stand-in for CUDA: python -m tests.offline_cuda")
    collect()
    stand_in = Recorder()
    stand_in.reset()
    yield stand_in
    collect()
