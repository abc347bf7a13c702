"""What torch's profiler saw of a step: operations on the host and kernels on a GPU, each with what called it."""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

STEP = "one step"
Dims = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Call:
    """An operation that ran, or a kernel that one (``parent``) launched."""

    name: str
    shapes: list[Dims]
    start: float  # of the operation on the host, microseconds
    us: float  # its own time, on the device that counts
    parent: "Call | None" = None
    kernel: bool = False

    def chain(self) -> "list[Call]":
        """The call, its parent, and so on."""
        return [self] if self.parent is None else [self, *self.parent.chain()]


@torch.no_grad()
def record(step: Callable[[], None], device: str, steps: int) -> list[Call]:
    """The calls of so many steps, after a warm-up."""
    cuda = device != "cpu"
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            # what is in no operation shows as the step's own time; on a GPU that time does not count
            with contextlib.nullcontext() if cuda else record_function(STEP):
                step()
        if cuda:
            torch.cuda.synchronize(device)
    events = list(profiler.events() or [])
    return calls_on_gpu(events) if cuda else list(calls_on_cpu(events, own_time=True).values())


def calls_on_cpu(events: list[Any], own_time: bool) -> dict[int, Call]:
    """Operations by the identity of their event, parents linked; ``own_time`` False leaves their times at 0."""
    calls: dict[int, Call] = {}

    def make(event: Any) -> Call:
        if id(event) not in calls:
            parent = None if event.cpu_parent is None else make(event.cpu_parent)
            shapes = [tuple(dims) for dims in event.input_shapes or []]
            us = event.self_cpu_time_total if own_time else 0.0
            calls[id(event)] = Call(event.name, shapes, event.time_range.start, us, parent)
        return calls[id(event)]

    for event in events:
        if event.device_type == DeviceType.CPU:
            make(event)
    return calls


def calls_on_gpu(events: list[Any]) -> list[Call]:
    """Operations without time of their own, and every kernel, copy and fill with its time on the device.

    A kernel belongs to the operation that launched it. One that the profiler links to none still counts.
    """
    calls = calls_on_cpu(events, own_time=False)
    # ranges that are mirrored to the device would count their kernels twice
    ran = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    ranges = {e.name for e in events if e.device_type == DeviceType.CUDA and e.is_user_annotation}
    kernels, left_us, left_calls = [], Counter[str](), Counter[str]()
    for event in ran:
        left_us[event.name] += event.time_range.end - event.time_range.start
        left_calls[event.name] += 1
    for event in events:
        for kernel in event.kernels if event.device_type == DeviceType.CPU else []:
            if kernel.name not in ranges:
                launcher = calls[id(event)]
                kernels.append(Call(kernel.name, [], launcher.start, kernel.duration, launcher, kernel=True))
                left_us[kernel.name] -= kernel.duration
                left_calls[kernel.name] -= 1
    for name, count in left_calls.items():
        kernels += [Call(name, [], 0.0, left_us[name] / count, kernel=True) for _ in range(count)]
    return [*calls.values(), *kernels]
