"""What the images are for, measured: quantized models and students on real test images.

python -m benchmarks.quality quantize --data cifar10:package
python -m benchmarks.student_weights --out runs/vit_small_patch14.safetensors
python -m benchmarks.quality transfer --data cifar10:package --student-checkpoint runs/vit_small_patch14.safetensors

With ``--teacher deit_base_patch16_224 --data imagenet:PATH --iterations 4000`` the first gives Table 3 of the paper.
Inverted images are kept in ``--work`` and shared by both; a run that was cut off goes on with the rows its CSV lacks.
"""

import argparse
import importlib.util
from pathlib import Path

import torch

from benchmarks import quality_quantize, quality_transfer
from benchmarks.common import RESULTS, device_argument, positive
from benchmarks.markdown import rows_of
from benchmarks.quality_images import Source
from benchmarks.quality_plot import plot
from benchmarks.quality_students import STUDENTS
from smi_fast.datasets import open_dataset
from smi_fast.model import load_model


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quantize", "transfer"))
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--data", required=True, help="cifar10:PATH or imagenet:PATH")
    parser.add_argument("--images", type=positive, default=384, help="inverted images of each kind")
    parser.add_argument("--iterations", type=positive, default=200)
    parser.add_argument("--seeds", type=positive, help="replicates [default: 5 to quantize, 3 to transfer]")
    parser.add_argument("--limit", type=positive, help="quantize: test images [default: all]")
    parser.add_argument("--only", nargs="*", help="quantize: such as psaq:4 fp32:32 [default: all]")
    parser.add_argument("--sizes", type=positive, nargs="+", default=[16, 32, 64, 128], help="transfer: images")
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=STUDENTS)
    parser.add_argument("--student", default="vit_small_patch14_dinov2", help="timm name of the backbone")
    parser.add_argument("--student-checkpoint", type=Path, help="its weights [default: timm's]")
    parser.add_argument("--student-size", type=positive, default=112, help="side of its images; same grid of patches")
    parser.add_argument("--device", type=device_argument, default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--out", type=Path, help="CSV")
    parser.add_argument("--plot", type=Path, help="transfer: a picture of the curves; needs matplotlib")
    args = parser.parse_args()
    if args.plot and (args.what != "transfer" or importlib.util.find_spec("matplotlib") is None):
        parser.error("argument --plot: for transfer, and with matplotlib: pip install 'smi-fast[plots]'")
    if args.iterations < 8:
        parser.error(f"--iterations {args.iterations}: must be at least 8, the schedule has four stops")
    args.sizes = sorted(args.sizes)
    args.seeds = args.seeds or (5 if args.what == "quantize" else 3)
    args.out = args.out or RESULTS / f"quality-{args.what}-{args.teacher}.csv"
    return args


def main() -> None:
    """Run one of the two."""
    args = parse()
    test, train = open_dataset(args.data), open_dataset(args.data, train=True)
    teacher = load_model(args.teacher, device=torch.device(args.device))
    if test.num_classes != teacher.shape.num_classes:
        raise SystemExit(f"--data {args.data}: {test.num_classes} classes, {args.teacher} knows others")
    source = Source(teacher, train, args.work, args.images, args.iterations)
    (quality_quantize if args.what == "quantize" else quality_transfer).run(args, source, test)
    if args.plot:
        plot(rows_of(args.out.resolve()), args.plot)
        print(f"drawn to {args.plot}")


if __name__ == "__main__":
    main()
