"""What `benchmarks/gpu.sh tests` starts, and that one part which hangs or fails leaves the others' results whole."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.harness.tables import ROOT

# stands in for Python: notes what it was asked for, and does as the test wants for the sanitizer's part
PYTHON = """#!/bin/sh
echo "$*" >> "{calls}"
case "$*" in
*"-m sanitizer"*) {sanitizer} ;;
*pytest*) echo "3 passed" ;;
esac
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A copy of the script with short limits, in a folder with some names of tests."""
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    assert "start_tests 180 sanitizer" in text
    path = tmp_path / "benchmarks" / "gpu.sh"
    path.parent.mkdir()
    path.write_text(text.replace("start_tests 180 sanitizer", "start_tests 1 sanitizer"))
    path.chmod(0o755)
    for name in ("tests/kernels/test_adam_update.py", "tests/kernels/test_ahead_of_time.py", "tests/test_gpu.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return path


def run(script: Path, sanitizer: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script's end, and what Python was asked for."""
    folder = script.parents[1]
    calls, programs = folder / "calls", folder / "bin"
    programs.mkdir()
    for name, text in (("python3", PYTHON.format(calls=calls, sanitizer=sanitizer)), ("nvidia-smi", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "OUT": "out", "PYTHON": "python3"}
    command = [str(script), "tests"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done, calls.read_text().splitlines()


def running() -> set[str]:
    """The command lines of all processes."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.add(path.read_text(errors="replace").replace("\0", " ").strip())
    return found


def test_the_sanitizer_is_a_part_of_its_own(script: Path) -> None:
    done, calls = run(script, "echo '1 passed'")
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [call for call in calls if "pytest" in call]
    assert len(tests) == 3
    for call in tests:
        assert call.startswith(
            ("-m pytest -m sanitizer tests/test_gpu.py", "-m pytest -m (kernel or gpu) and not sanitizer tests/")
        )
    assert "sanitizer: 1 passed" in done.stdout
    assert "test_gpu: 3 passed" in done.stdout


def test_a_sanitizer_that_hangs_leaves_nothing_behind(script: Path) -> None:
    # its child outlives its parent unless the whole group is ended
    child = f"sleep 57.{os.getpid()}"
    done, calls = run(script, f"{child} & {child}")
    assert done.returncode == 1
    assert "== sanitizer failed with exit code 124" in done.stdout
    assert "test_gpu: 3 passed" in done.stdout
    assert "test_adam_update: 3 passed" in done.stdout
    assert any("benchmarks run engine" in call for call in calls), "what follows runs all the same"
    assert child not in running()
