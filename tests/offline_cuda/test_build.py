"""Where the stand-in cannot be built there is a reason; no stand-in is needed here."""

from pathlib import Path

import pytest

from tests.offline_cuda import __main__ as command
from tests.offline_cuda import build


@pytest.mark.parametrize("program", ["gcc", "c++filt"])
def test_a_program_that_is_missing(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None if name == program else f"/usr/bin/{name}")
    assert build.why_not() == f"{program} is not installed"


def test_headers_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(build.sys, "path", [str(tmp_path / "site-packages")])
    assert build.why_not() == "the installed torch and Triton bring no cuda.h"


def test_the_command_says_so_and_stops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "why_not", lambda: "gcc is not installed")
    monkeypatch.setattr(command.os, "execve", lambda *_: pytest.fail("started all the same"))
    command.main([])
    assert capsys.readouterr().out == "skipped: gcc is not installed\n"
