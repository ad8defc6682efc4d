"""Compiles the C++ files of this folder for the processor at hand, once, and loads them.

The library is kept where PyTorch keeps compiled extensions (`TORCH_EXTENSIONS_DIR`, or a folder of the
user's cache), under a name that depends on the sources, the command and the processor. It contains no
part of PyTorch, so it takes two seconds to make, and serves every version of it.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared")
_NUMBERS = ("-fno-math-errno", "-fno-trapping-math")  # nothing asks which operation failed
_THREADS = {"linux": "-fopenmp", "darwin": "-fopenmp-simd"}
_SECONDS = 120
"""After this time, a compiler that has not finished is given up."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where there is no compiler or it fails, which is then logged."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or sys.platform not in _THREADS:
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning(
            "kernels could not be compiled, and plain PyTorch takes their place: %s", said
        )
        return None


@cache
def kernel(name: str, *types: type) -> Callable[..., None]:
    """A function of the library, which there must be.

    Args:
        types: of its arguments, from `ctypes`.
    """
    compiled = library()
    assert compiled is not None, "ask `applies` first"
    function = compiled[name]
    function.argtypes, function.restype = types, None
    return function


def _built(compiler: str) -> Path:
    """The library's file, which is made if there is none."""
    sources = sorted(FOLDER.glob("*.cpp"))
    command = [compiler, *_FLAGS, *_NUMBERS, _THREADS[sys.platform], *map(str, sources), "-o"]
    parts = [path.read_bytes() for path in (*sources, *FOLDER.glob("*.h"))]
    parts += [" ".join(command[: -len(sources) - 1]).encode(), _processor().encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    target = Path(folder) / "mor_layers" / f"cpu_kernels-{digest}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # One process compiles and others wait. The lock ends with its process, however that ends, and the
    # library gets its name when it is complete.
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            made = target.with_suffix(f".{os.getpid()}")
            subprocess.run(
                [*command, str(made)], check=True, capture_output=True, text=True, timeout=_SECONDS
            )
            with made.open("rb") as file:
                os.fsync(file.fileno())  # a power failure must not leave an empty file
            made.replace(target)
    return target


def _processor() -> str:
    """What distinguishes processors that need libraries of their own."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    features = (line for line in lines if line.lower().startswith(("flags", "features")))
    return f"{platform.machine()} {platform.processor()} {next(features, '')}"
