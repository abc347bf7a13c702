"""``report.json``: what a run did, how long it took, and what came of it."""

from typing import Any

from smi_fast.engine.inverter import Inverter
from smi_fast.engine.state import uses_kernels
from smi_fast.images import SparseImages
from smi_fast.kernels.patch_mask import kept_statistics
from smi_fast.model.flops import run_flops
from smi_fast.schedule import sparsity
from smi_fast.storage.environment import device_name, peak_memory_bytes, processor, versions


def build_report(inverter: Inverter, images: SparseImages, interrupted: bool = False) -> dict[str, Any]:
    """The contents of ``report.json``; seconds are wall-clock, compilation is counted apart.

    Args:
        inverter: after its run.
        images: what it gave, all batches together.
        interrupted: the run was ended before all images were done.
    """
    model, config, stats = inverter.model, inverter.config, inverter.stats
    flops = run_flops(model.shape, inverter.stages)
    mean, deviation = kept_statistics(images.pixels, images.keep, images.grid)
    failures = (images.failed_at >= 0).nonzero().flatten().tolist()
    return {
        "images": len(images),
        "labels": images.labels.tolist(),
        "image_ids": images.image_ids.tolist(),
        "image_size": [model.grid.height, model.grid.width],
        "interrupted": interrupted,
        "iterations": config.iterations,
        "sparsity": sparsity(inverter.stages, model.grid.patches),
        "stages": [
            {
                "start": stage.start,
                "end": stage.end,
                "kept": stage.kept,
                "tokens": stage.kept + model.shape.prefix,
                "seconds": seconds,
            }
            for stage, seconds in zip(inverter.stages, stats.stage_seconds, strict=True)
        ],
        "seconds_compile": stats.seconds_compile,
        "seconds_run": stats.seconds_run,
        "seconds_per_image": stats.seconds_run / len(images),
        "image_iterations_per_s": len(images) * config.iterations / stats.seconds_run,
        "flops": {
            "true_per_image": flops.true,
            "paper_convention_per_image": flops.paper,
            "true_per_s": flops.true * len(images) / stats.seconds_run,
        },
        "peak_memory_bytes": peak_memory_bytes(model.device),
        "teacher_top1": images.top1,
        "teacher_confidence": float(images.confidence.double().mean()),
        "kept_pixels": {  # by channel, normalised colours, mean over the images
            "mean": mean.mean(0).tolist(),
            "std": deviation.mean(0).tolist(),
        },
        "failed": [{"image_id": int(images.image_ids[i]), "iteration": int(images.failed_at[i])} for i in failures],
        "recipe": config.to_dict(),
        "batch_size": list(inverter.batches),
        "batch_source": inverter.batch_source,  # "given", "tuned" or "default"
        "impl": inverter.impl,
        "kernels": "triton" if uses_kernels(model) else "torch",
        "dtype": model.precision,
        "device": device_name(model.device),
        "processor": processor(),
        "model": {"name": model.info.name, "sha256": model.info.sha256},
        "versions": versions(),
        "seed": config.seed,
    }
