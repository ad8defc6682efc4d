"""Which `apex` is installed: NVIDIA's, whose fused norms and optimizers are used, or another.

NVIDIA's is built from source (github.com/NVIDIA/apex). The package that a package index calls `apex`
has nothing to do with it.
"""

import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Apex = Literal["nvidia", "nvidia without kernels", "unrelated", "absent"]

_FILES = ("normalization/fused_layer_norm.py", "optimizers/fused_adam.py", "multi_tensor_apply")
_KERNELS = ("amp_C", "fused_layer_norm_cuda")


@cache
def installed_apex() -> Apex:
    """What `import apex` would find, without importing it."""
    found = find_spec("apex")
    if found is None:
        return "absent"
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    if not any(all((folder / file).exists() for file in _FILES) for folder in folders):
        return "unrelated"
    has_kernels = all(find_spec(name) is not None for name in _KERNELS)
    return "nvidia" if has_kernels else "nvidia without kernels"


@cache
def has_apex() -> bool:
    """Whether NVIDIA's apex is there with the kernels of its norms and optimizers.

    Warns, once, of an `apex` that is not: Megatron takes any for NVIDIA's, and its own layer specs
    then ask for a norm that cannot be built. Ours do not.
    """
    installed = installed_apex()
    advice = {
        "unrelated": "is not NVIDIA's, but an unrelated package of the same name, and is not used. "
        "Remove it (pip uninstall apex); NVIDIA's is built from source, or use Transformer Engine.",
        "nvidia without kernels": "was installed without its CUDA extensions, and is not used. Build "
        "it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or use Transformer Engine.",
    }.get(installed)
    if advice is not None:
        found = find_spec("apex")
        place = "" if found is None else f" ({found.origin or 'a folder without __init__.py'})"
        warnings.warn(f"the package 'apex'{place} {advice}", stacklevel=2)
    return installed == "nvidia"
