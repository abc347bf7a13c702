"""Rows of a state: some of its images, in memory of their own."""

from dataclasses import fields

from smi_fast.engine.state import State

SHARED = ("iteration", "rates")  # the same for all images
# what a step changes; the rest hangs on the stage
CHANGED = ("canvas", "first", "second", "failed_at", "losses", "scores")


def take_rows(state: State, start: int, count: int) -> State:
    """A copy of ``count`` images from ``start`` on."""
    rows = {}
    for field in fields(state):
        value = getattr(state, field.name)
        if value is not None:
            value = value.clone() if field.name in SHARED else value[start : start + count].clone()
        rows[field.name] = value
    return State(**rows)


def load_rows(target: State, state: State, start: int) -> None:
    """Fill ``target`` with the images of ``state`` from ``start`` on, as many as it holds; its memory stays its own."""
    count = len(target.canvas)
    for field in fields(state):
        value, place = getattr(state, field.name), getattr(target, field.name)
        if place is not None:
            place.copy_(value if field.name in SHARED else value[start : start + count])


def store_rows(state: State, rows: State, start: int) -> None:
    """Put what steps have changed in ``rows`` back into ``state``, from image ``start`` on."""
    count = len(rows.canvas)
    for name in CHANGED:
        getattr(state, name)[start : start + count].copy_(getattr(rows, name))
    if state.spare is not None:  # between steps both canvases are the same but for updated pixels, which are rewritten
        state.spare[start : start + count].copy_(rows.canvas)
