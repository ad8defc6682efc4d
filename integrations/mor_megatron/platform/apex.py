"""Detects which `apex` is installed: NVIDIA's, with fused norms and optimizers, or another package.

NVIDIA's apex is built from source (github.com/NVIDIA/apex). The package named `apex` on the package
index is unrelated to it.
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
    """The kind of package that `import apex` would find. It is not imported."""
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
    """Whether NVIDIA's apex is installed with the kernels of its norms and optimizers.

    Warns once about any other `apex`, because Megatron assumes that every `apex` is NVIDIA's. Its
    layer specs then choose a norm that cannot be built. Our layer specs call this function instead.
    """
    installed = installed_apex()
    advice = {
        "unrelated": "is not NVIDIA's apex but an unrelated package of the same name, and is not used. "
        "Remove it (pip uninstall apex). Build NVIDIA's apex from source, or use Transformer Engine.",
        "nvidia without kernels": "was installed without its CUDA extensions and is not used. Build "
        "it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or use Transformer Engine.",
    }.get(installed)
    if advice is not None:
        found = find_spec("apex")
        place = "" if found is None else f" ({found.origin or 'a folder without __init__.py'})"
        warnings.warn(f"the package 'apex'{place} {advice}", stacklevel=2)
    return installed == "nvidia"
