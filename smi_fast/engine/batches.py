"""How many images each stage works on at a time."""

from collections.abc import Sequence


def stage_batches(batch_size: int | Sequence[int], stages: int, may_differ: bool) -> tuple[int, ...]:
    """A batch for each stage.

    Raises:
        ValueError: a number that is no integer of at least 1, another count than there are stages, one that does not
            divide the largest, or different ones where they may not differ.
    """
    sizes = tuple(batch_size) if isinstance(batch_size, Sequence) else (batch_size,) * stages
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_size={batch_size!r}: must be an integer of at least 1, or one for each stage")
    if len(sizes) != stages:
        raise ValueError(f"batch_size={batch_size!r}: {len(sizes)} numbers for {stages} stages")
    for size in sizes:
        if max(sizes) % size:
            raise ValueError(f"batch_size={batch_size!r}: each must divide the largest, {max(sizes)}; {size} does not")
    if not may_differ and len(set(sizes)) > 1:
        raise ValueError(
            f"batch_size={batch_size!r}: preset 'reference' ties batch-mates, so all stages need one batch"
        )
    return sizes


def even_batches(images: int, limits: tuple[int, ...]) -> tuple[int, ...]:
    """Batches, one a stage, none above its limit, that take ``images`` images in as few groups and with little filling.

    A group is what goes through the stages together: as many images as the largest batch, and each batch divides it.

    Args:
        images: how many there are, at least 1.
        limits: the largest batch of each stage.

    Returns:
        A batch for each stage; the largest is the size of a group.
    """
    most = max(limits)
    group = -(-images // -(-images // most))  # as many groups as full ones would be, all of one size
    while True:
        chunks = [-(-group // limit) for limit in limits]
        if all(group % count == 0 for count in chunks):
            return tuple(group // count for count in chunks)
        group += 1


def halved(batch: int) -> int:
    """The largest divisor of ``batch`` that is at most half of it; 0 for 1."""
    return next((size for size in range(batch // 2, 0, -1) if batch % size == 0), 0)


def lowered(batches: tuple[int, ...], stage: int, smaller: int) -> tuple[int, ...]:
    """The batches with a smaller one at ``stage``; others give way where they no longer divide the largest."""
    limits = [smaller if index == stage else batch for index, batch in enumerate(batches)]
    most = max(limits)
    return tuple(next(size for size in range(limit, 0, -1) if most % size == 0) for limit in limits)
