"""What must not be in the rows of a run, as sentences. An empty list is a pass."""

from collections import Counter
from collections.abc import Iterable, Sequence

from tests.offline_cuda.recorder import Memory, Row

# in a capture PyTorch's allocator may take memory for the pool of the captures, which is why cudaMalloc is not here
NEVER_IN_A_CAPTURE = ("WAIT", "FREE", "HOSTALLOC", "MODULE", "CUBLAS", "HOSTFUNC")
ALLOCATIONS = ("MALLOC", "FREE", "HOSTALLOC")


def sentences(found: Iterable[str]) -> list[str]:
    """Each once, with its count."""
    return [f"{text} ({times} times)" if times > 1 else text for text, times in Counter(found).items()]


def faults_of_step(rows: Sequence[Row]) -> list[str]:
    """Of single steps after the first: waits, allocations, copies from the host, spills, complaints."""
    found = [f"{row.name} waits" for row in rows if row.kind == "WAIT"]
    found += [f"{row.name} in a step" for row in rows if row.kind in (*ALLOCATIONS, "MODULE", "CUBLAS")]
    found += [f"copy {row.name} in a step" for row in rows if row.kind == "COPY" and row.name != "device to device"]
    return sentences([*found, *_spills(rows), *_complaints(rows)])


def faults_of_run(rows: Sequence[Row], device: int) -> list[str]:
    """Of a whole run on a device: work beside a capture, calls that break one, other devices, spills, complaints."""
    found = list[str]()
    capturing = set[int]()  # threads
    for row in rows:
        if row.kind == "CAPTURE":
            (capturing.add if row.name == "begin" else capturing.discard)(row.thread)
        elif row.thread in capturing:
            if row.is_work and not row.capture:
                found.append(f"{row.name} outside the capture of its thread")
            if row.kind in NEVER_IN_A_CAPTURE:
                found.append(f"{row.name} during a capture")
        works = row.is_work or row.kind in ("MALLOC", "EVENT", "CAPTURE", "GRAPH")
        if works and row.device != device:
            found.append(f"{row.kind} {row.name} on device {row.device}, not {device}")
    return sentences([*found, *_spills(rows), *_complaints(rows)])


def empty_captures(rows: Sequence[Row]) -> list[str]:
    """Captures with nothing in them: the work went elsewhere."""
    ends = [row for row in rows if (row.kind, row.name) == ("CAPTURE", "end")]
    return sentences("a capture of no launches" for row in ends if not row.nodes)


def live_graphs(rows: Sequence[Row]) -> int:
    """Graphs that were instantiated and not destroyed within the rows."""
    names = Counter(row.name for row in rows if row.kind == "GRAPH")
    return names["instantiate"] - names["destroy"]


def copied_weights(memory: Memory, weights: int) -> list[str]:
    """A bucket shares the weights, of ``weights`` bytes: it holds little but the buffers of its state."""
    besides = memory.allocated - memory.buffers
    return [f"a bucket holds {besides} bytes besides its state, of {weights} in the weights"] * (besides > weights / 2)


def _spills(rows: Iterable[Row]) -> list[str]:
    return [f"{row.name} spills {row.spilled} bytes" for row in rows if row.kind == "KERNEL" and row.spilled > 0]


def _complaints(rows: Iterable[Row]) -> list[str]:
    return [row.name for row in rows if row.kind == "COMPLAINT"]
