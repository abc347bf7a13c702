"""Nonsense on the command line of an experiment is refused by the argument's name."""

import importlib.util

import pytest
import torch

from benchmarks.harness.arguments import SHARED, Parser, inversion_length


@pytest.fixture
def parser() -> Parser:
    found = Parser("some", "What it does.")
    for name in SHARED:
        found.share(name)
    found.add_argument("--iterations", type=inversion_length)
    found.add_argument("--plot", action="store_true")
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "argument --batch: '0': must be an integer of at least 1"),
        (["--steps", "-3"], "argument --steps"),
        (["--threads", "two"], "argument --threads"),
        (["--iterations", "7"], "argument --iterations: '7': must be at least 8"),
        (["--model", "deit_of_nobody"], "argument --model: 'deit_of_nobody': timm knows no such model"),
        (["--device", "cuda:99"], "argument --device: 'cuda:99': no such CUDA device here"),
        (["--device", "tpu"], "argument --device: 'tpu': must be cpu, cuda or cuda:N"),
    ],
)
def test_nonsense_is_refused(
    parser: Parser, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_the_work(
    parser: Parser, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parser.parse(["--plot"])
    assert "argument --plot: matplotlib is not installed: pip install 'smi-fast[plots]'" in capsys.readouterr().err


def test_threads_are_put_into_force(parser: Parser) -> None:
    before = torch.get_num_threads()
    try:
        assert parser.parse(["--threads", str(before + 1)]).threads == torch.get_num_threads() == before + 1
        assert parser.parse([]).threads == before + 1
    finally:
        torch.set_num_threads(before)
