"""The tests of this folder on two CUDA devices that are not there: ``python -m tests.offline_cuda [pytest arguments]``.

``--write-tables`` writes the tables anew in place of comparing with them.
"""

import os
import sys
from pathlib import Path

from tests.offline_cuda.build import build, environment, why_not

HERE = Path(__file__).parent


def main(arguments: list[str]) -> None:
    """Build the stand-in and become pytest under it; all tests share one process, which imports torch once."""
    if reason := why_not():
        print(f"skipped: {reason}")
        return
    # the marker that plain `pytest` leaves out
    words = ["-m", "pytest", str(HERE), "-m", "", "-p", "no:cacheprovider", *arguments]
    os.execve(sys.executable, [sys.executable, *words], environment(build()))


if __name__ == "__main__":
    main(sys.argv[1:])
