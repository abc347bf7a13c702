"""The stand-in as a shared library, and the environment in which it takes the place of CUDA.

It is preloaded under the real PyTorch and Triton: what it defines of the CUDA runtime, the driver and cuBLAS is found
before the libraries of the wheels. It is also the ``libcuda.so.1`` that both ask for by name.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "stub"
LIBRARY = "libcuda.so.1"
FLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Werror", "-shared", "-fPIC")
HEADERS = ("cuda.h", "cuda_runtime_api.h")
# where the wheels of torch and Triton have them
INCLUDES = ("nvidia/cu*/include", "nvidia/cuda_runtime/include", "triton/backends/nvidia/include")


def includes() -> list[Path]:
    """The folders of CUDA headers that the installed wheels bring."""
    sites = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    return [folder for site in sites for pattern in INCLUDES for folder in sorted(site.glob(pattern))]


def why_not() -> str | None:
    """None where the stand-in can be built, else the reason."""
    if sys.platform != "linux":
        return f"the stand-in for CUDA needs Linux, not {sys.platform}"
    for program in ("gcc", "c++filt"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    for header in HEADERS:
        if not any((folder / header).exists() for folder in includes()):
            return f"the installed torch and Triton bring no {header}"
    return None


def build() -> Path:
    """Compile the sources, unless that was done; returns the folder of the library, one for each state of the sources.

    Raises:
        subprocess.CalledProcessError: gcc fails; it has said why.
        PermissionError: the folder in the system's temporary folder belongs to somebody else.
    """
    files = sorted(SOURCES.iterdir())
    folders = [f"-I{folder}" for folder in includes()]
    state = hashlib.sha256(repr([*FLAGS, *folders]).encode() + b"".join(file.read_bytes() for file in files))
    home = Path(tempfile.gettempdir()) / f"smi_fast-offline_cuda-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    if home.stat().st_uid != os.getuid():
        raise PermissionError(f"{home} belongs to another user")
    folder = home / state.hexdigest()[:16]
    if not (folder / LIBRARY).exists():
        folder.mkdir(exist_ok=True)
        # under a name of its own first: another process may build the same
        made = folder / f"{os.getpid()}.so"
        code = [str(file) for file in files if file.suffix == ".c"]
        links = [f"-Wl,-soname,{LIBRARY}", "-ldl", "-lpthread"]
        subprocess.run(["gcc", *FLAGS, *folders, "-o", str(made), *code, *links], check=True)
        made.rename(folder / LIBRARY)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The variables of a process that is to run on the stand-in, which lies in ``folder``."""
    before = dict(os.environ)
    paths = [str(folder), *before.get("LD_LIBRARY_PATH", "").split(":")]
    return before | {
        "LD_PRELOAD": str(folder / LIBRARY),
        "LD_LIBRARY_PATH": ":".join(path for path in paths if path),
        "TRITON_LIBCUDA_PATH": str(folder),
        # kernels are compiled in this process, where they are watched
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(SOURCES.parents[2]), *filter(None, [before.get("PYTHONPATH")])]),
    }
