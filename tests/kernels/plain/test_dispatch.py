"""Which implementation runs, what is refused, and how launch configurations are found; no kernel is launched."""

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smi_fast.kernels.adam_update import AdamConstants, LossGradient, TVTerm, Updated, adam_update
from smi_fast.kernels.common import configs, dispatch
from smi_fast.kernels.common.check import check, check_ids
from smi_fast.kernels.common.configs import Config
from smi_fast.kernels.common.dispatch import KERNELS_VARIABLE, OPS, choose
from smi_fast.kernels.common.grid import Grid, Moves, slot_of_patch
from smi_fast.kernels.common.launch import Launch
from smi_fast.kernels.patch_gather import gather_launch, patch_gather
from smi_fast.kernels.patch_ungather import patch_ungather
from smi_fast.kernels.total_variation import total_variation

ROOT = Path(__file__).parent.parent.parent.parent
GRID = Grid(8, 12, 4)
ON_CPU, ON_META = torch.zeros(1), torch.zeros(1, device="meta")


def test_torch_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    assert choose("op", None, ON_CPU) == "torch"
    with pytest.raises(ValueError, match="op: impl='triton' cannot run: no kernels for tensors on 'cpu' without TRIT"):
        choose("op", "triton", ON_CPU)


def test_the_interpreter_runs_kernels_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert choose("op", None, ON_CPU) == "torch"
    assert choose("op", "triton", ON_CPU) == "triton"
    monkeypatch.setenv(KERNELS_VARIABLE, "triton")
    assert choose("op", None, ON_CPU) == "triton"
    assert choose("op", "torch", ON_CPU) == "torch"


class OnCuda:
    """Enough of a tensor."""

    device = torch.device("cuda")


def test_cuda_takes_kernels_unless_they_are_off_or_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda: Any = OnCuda()
    assert choose("op", None, cuda) == "triton"
    with pytest.warns(UserWarning, match="op: plain torch runs instead of the kernel: float64 has no kernel"):
        assert choose("op", None, cuda, "float64 has no kernel") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        assert choose("op", None, cuda, "float64 has no kernel") == "torch"
    with pytest.raises(ValueError, match="cannot run: float64 has no kernel"):
        choose("op", "triton", cuda, "float64 has no kernel")
    monkeypatch.setenv(KERNELS_VARIABLE, "torch")
    assert choose("op", None, cuda) == "torch"


def test_everything_imports_without_triton() -> None:
    lines = [
        "import sys; sys.modules['triton'] = None",
        "import smi_fast.cli, torch",
        "from smi_fast.kernels import patch_mask",
        "from smi_fast.kernels.common import dispatch, grid",
        "assert not dispatch.HAS_TRITON",
        "assert patch_mask.patch_mask(torch.tensor([[2]]), grid.Grid(4, 4, 2)).sum() == 4",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=Path(__file__).parent.parent.parent.parent)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        choose("op", "triton", ON_CPU)


def test_unknown_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="impl='cuda': must be 'triton', 'torch' or None"):
        choose("op", "cuda", ON_CPU)  # type: ignore[arg-type]
    monkeypatch.setenv(KERNELS_VARIABLE, "off")
    with pytest.raises(ValueError, match="SMI_FAST_KERNELS='off': must be"):
        choose("op", None, ON_CPU)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 3), "op: x of shape (2, 3): must be [B, 3, H]"),
        (torch.zeros(2, 4, 5), "op: x of shape (2, 4, 5): must be [B, 3, H]"),
        (torch.zeros(2, 3, 0), "op: x of shape (2, 3, 0): H is 0, must be at least 1"),
        (torch.zeros(7, 3, 5), "op: x of shape (7, 3, 5): must be [B, 3, H] with B=2"),
        (torch.zeros(2, 3, 5, dtype=torch.int32), "op: x is int32: must be float64 or float32"),
        (torch.zeros(2, 3, 5, device="meta"), "op: x is on meta, first on cpu: must be on one device"),
    ],
)
def test_check_names_what_is_wrong(tensor: Tensor, message: str) -> None:
    first = (torch.zeros(2, 1), "B 1", (torch.float32,))
    with pytest.raises(ValueError, match=re.escape(message)):
        check("op", {"first": first, "x": (tensor, "B 3 H", (torch.float64, torch.float32))})


def test_check_refuses_an_empty_batch() -> None:
    with pytest.raises(ValueError, match=re.escape("op: x of shape (0, 3): B is 0, must be at least 1")):
        check("op", {"x": (torch.zeros(0, 3), "B 3", (torch.float32,))})


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 1], [2, 6]], r"keep\[1, 1\]=6: must be a patch id in 0\.\.5"),
        ([[-1, 1], [2, 3]], r"keep\[0, 0\]=-1: must be"),
        ([[0, 1], [3, 3]], r"keep\[1\] goes from 3 to 3: ids must ascend"),
        ([[4, 1], [2, 3]], r"keep\[0\] goes from 4 to 1"),
    ],
)
def test_check_ids(ids: list[list[int]], message: str) -> None:
    check_ids("keep", torch.tensor([[0, 3], [1, 5]]), 6)
    with pytest.raises(ValueError, match=message):
        check_ids("keep", torch.tensor(ids), 6)


def still() -> Moves:
    """Two images that are not moved."""
    return Moves(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool))


def gather_arguments() -> dict[str, Any]:
    keep = torch.tensor([[0, 3, 5], [1, 2, 4]])
    return {"canvas": torch.zeros(2, 3, 8, 12), "keep": keep, "moves": still(), "patch": 4, "dtype": torch.float32}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("canvas", torch.zeros(3, 8, 12), "canvas of shape (3, 8, 12): must be [B, 3, H, W]"),
        ("canvas", torch.zeros(2, 3, 8, 12, dtype=torch.float16), "canvas is float16"),
        ("canvas", torch.zeros(0, 3, 8, 12), "B is 0"),
        ("keep", torch.zeros(2, 0, dtype=torch.int64), "keep of shape (2, 0): K is 0"),
        ("keep", torch.zeros(2, 3, dtype=torch.int32), "keep is int32: must be int64"),
        ("moves", still()._replace(shift=torch.zeros(2, 3).long()), "moves.shift of shape (2, 3): must be [B, 2]"),
        ("moves", still()._replace(flip=torch.zeros(3).bool()), "moves.flip of shape (3,): must be [B] with B=2"),
        ("moves", still()._replace(flip=still().flip.to("meta")), "moves.flip is on meta, canvas on cpu"),
        ("dtype", torch.int32, "dtype=torch.int32"),
        ("patch", 5, "height=8: must be a positive multiple"),
        ("impl", "fast", "impl='fast'"),
    ],
)
def test_gather_refuses(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        patch_gather(**gather_arguments() | {name: value})


def test_ungather_refuses() -> None:
    keep = torch.tensor([[0, 3, 5], [1, 2, 4]])
    slots = slot_of_patch(keep, 6)
    with pytest.raises(ValueError, match=re.escape("gradient of shape (2, 3, 47): must be [B, K, N] with N=48")):
        patch_ungather(torch.zeros(2, 3, 47), slots, keep, still(), GRID)
    with pytest.raises(ValueError, match="slots is int64: must be int32"):
        patch_ungather(torch.zeros(2, 3, 48), slots.long(), keep, still(), GRID)


def test_total_variation_refuses() -> None:
    canvas, keep = torch.zeros(2, 3, 8, 12), torch.tensor([[0], [1]])
    with pytest.raises(ValueError, match="norm='l1': must be 'pixel', 'image' or 'batch'"):
        total_variation(canvas, keep, GRID, "l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("canvas of shape (2, 3, 8, 16): must be [B, 3, H, W] with W=12")):
        total_variation(torch.zeros(2, 3, 8, 16), keep, GRID, "pixel")
    with pytest.raises(ValueError, match="updated of shape"):
        total_variation(canvas, keep[:1], GRID, "pixel")


def test_adam_update_refuses() -> None:
    canvas, ids = torch.zeros(2, 3, 8, 12), torch.tensor([[0], [1]])
    moment, slots, limit = torch.zeros(2, 1, 3, 4, 4), slot_of_patch(ids, 6), torch.ones(3, 1, 1)
    constants, rates, healthy = AdamConstants(0.5, 0.99, 1e-8, -limit, limit), torch.ones(3), still().flip
    target = Updated(canvas, canvas, moment, moment.clone(), ids, slots)
    gradient = LossGradient(torch.zeros(2, 1, 48), slots, still(), healthy)
    adam_update(target, gradient, rates, constants)
    with pytest.raises(ValueError, match=re.escape("rates of shape (2,): must be [3]")):
        adam_update(target, gradient, rates[:2], constants)
    half = Updated(canvas, canvas, moment, moment.double(), ids, slots)
    with pytest.raises(ValueError, match="exp_avg_sq is float64: must be float32"):
        adam_update(half, gradient, rates, constants)
    with pytest.raises(ValueError, match="norm='l1'"):
        adam_update(target, gradient, rates, constants, TVTerm(1.0, "l1"))  # type: ignore[arg-type]
    more = LossGradient(torch.zeros(2, 1, 48), slots, still(), healthy, moment[:, :, :1])
    with pytest.raises(ValueError, match=r"gradient\.patches of shape"):
        adam_update(target, more, rates, constants)


def launch_in(config: Config) -> Launch:
    keep = torch.zeros(2, 3, dtype=torch.int64)
    return gather_launch(torch.zeros(2, 3, 8, 12), keep, still(), 4, torch.float32, config)[0]


def test_the_fastest_candidate_is_found_on_copies() -> None:
    seen: list[tuple[int, int]] = []

    def milliseconds(launch: Launch) -> float:
        block, warps = launch.constants["BLOCK"], launch.warps
        seen.append((block, warps))
        launch.arguments["canvas"].fill_(torch.nan)  # type: ignore[union-attr]
        return abs(block - 256) + abs(warps - 2)

    original = launch_in(Config(128, 1))
    assert configs.fastest(lambda config: launch_in(config), milliseconds) == Config(256, 2)
    assert len(seen) == len(configs.CANDIDATES)
    assert torch.equal(original.arguments["canvas"], torch.zeros(2, 3, 8, 12))  # type: ignore[arg-type]


def test_ops_that_are_cut_up_in_another_way_have_candidates_of_their_own() -> None:
    assert configs.candidates_of("adam_update") == configs.CANDIDATES
    for op, pinned in configs.PINNED.items():
        for config in pinned.values():
            assert type(configs.candidates_of(op)[0]) is type(config), op
    assert configs.candidates_of("tile_attention_backward") == configs.OWN_CANDIDATES["tile_attention"]
    assert max(config.block for config in configs.candidates_of("add_layer_norm_backward")) == 4


def test_copies_of_views_keep_their_strides() -> None:
    view = torch.arange(24.0).reshape(2, 3, 4)[:, 1:, ::2].transpose(0, 1)
    twin = configs._twin(view)
    assert (twin.stride(), twin.storage_offset()) == (view.stride(), view.storage_offset())
    assert torch.equal(twin, view)
    twin.zero_()
    assert view.sum() > 0


def test_nothing_is_tuned_unasked_or_off_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_tuned", {})
    assert configs.best("adam_update", 16, launch_in) == configs.PINNED["adam_update"][16]
    assert configs.best("adam_update", 7, launch_in) == configs.PINNED["adam_update"][0]
    monkeypatch.setenv(configs.AUTOTUNE_VARIABLE, "1")
    assert configs.best("adam_update", 16, launch_in) == configs.PINNED["adam_update"][16]
    assert configs.tuned_table() == ""


def test_what_was_tuned_is_printed_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_tuned", {("adam_update", 16): Config(512, 8)})
    monkeypatch.setenv(configs.AUTOTUNE_VARIABLE, "1")
    assert configs.best("adam_update", 16, launch_in) == Config(512, 8)
    table = eval("{" + configs.tuned_table() + "}", {"Config": Config})
    assert table == {"adam_update": {0: configs.PINNED["adam_update"][0], 16: Config(512, 8)}}


def test_single_kernels_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda: Any = OnCuda()
    monkeypatch.setenv(KERNELS_VARIABLE, "auto -mlp  -remap")
    assert [choose(op, None, cuda) for op in ("mlp", "remap", "adam_update")] == ["torch", "torch", "triton"]
    assert choose("mlp", "triton", cuda) == "triton", "whoever names an implementation gets it"
    monkeypatch.setenv(KERNELS_VARIABLE, "torch -mlp")
    assert choose("adam_update", None, cuda) == "torch"


@pytest.mark.parametrize("text", ["auto -nlp", "auto mlp", "-mlp", " ", "auto,-mlp"])
def test_a_switch_that_is_not_understood(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, text)
    with pytest.raises(ValueError, match=rf"SMI_FAST_KERNELS={re.escape(repr(text))}: .*must be"):
        choose("mlp", None, ON_CPU)


def test_every_op_can_be_left_out() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert set(re.findall(r'choose\("(\w+)"', sources)) == set(OPS)
