"""Import paths of version 0.1, which still work and tell where each name is now.

A package passes its table of old modules to `keep_old_modules`. Nothing else in the new layout
refers to the old one, so that the tables can be deleted in one piece.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_GENERATION = "mor_layers.generation"
NAMES = {
    **dict.fromkeys(("EncoderLayers", "PointwiseLayers", "ExpertRouters"), "mor_layers.layers"),
    **dict.fromkeys(
        ("KVPolicy", "attend", "causal_mask", "ExpertUse", "Sharing", "SharingSchedule"),
        "mor_layers.recursion",
    ),
    **dict.fromkeys(
        (
            *("CacheSettings", "Calibration", "calibrate", "deepened", "DepthBatchingEngine"),
            *("Event", "with_early_exit", "Sampling", "Request", "turn_dial"),
        ),
        _GENERATION,
    ),
    **dict.fromkeys(
        ("Distillation", "DistilledOutput", "Distiller", "Healing", "heal"), "mor_layers.training"
    ),
    **dict.fromkeys(
        (
            *("Acceleration", "Confidence", "Criterion", "Divergence", "ExitProbability"),
            *("Deepened", "registered_routers", "Thresholds"),
        ),
        "mor_layers.routers",
    ),
    **dict.fromkeys(("Inspection", "inspect_text"), "mor_layers.inspection"),
    **dict.fromkeys(("LocalPlacement", "Placement"), "mor_layers.selection"),
    "DecoderStack": "mor_layers.models",
}
"""Where the names that `mor_layers` itself exported are now."""

MODULES = {
    "accounting": ("costs.counting", "costs.shapes"),
    "adapters": ("layers.adapters",),
    "attention": ("recursion.kv_policies", "recursion.attention"),
    "cached_attention": ("generation.cache.attention",),
    "caches": ("generation.cache.caches",),
    "calibration": ("generation.depth.calibration",),
    "config": ("models.config", "settings.mapping"),
    "decoding": ("generation.tick.runner",),
    "deepening": ("generation.depth.deepening", "routers.deepened"),
    "depth_batching": ("generation.engine",),
    "distillation": ("training.distillation",),
    "early_exit": ("generation.depth.early_exit", "routers.exits.early_exit"),
    "field_types": ("settings.field_types",),
    "healing": ("training.healing",),
    "in_flight": ("generation.tick.in_flight",),
    "incremental": ("generation.incremental",),
    "kv_cache": ("generation.cache.policies",),
    "kv_memory": ("generation.cache.memory",),
    "lockstep": ("generation.ranks.lockstep",),
    "losses": ("routers.losses",),
    "model_folder": ("weights.folder",),
    "moe": ("layers.moe", "recursion.expert_use"),
    "relaxation": ("layers.relaxation",),
    "routers.baselines": ("routers.loops.baselines",),
    "routers.depth_and_width": ("routers.choice.depth_and_width",),
    "routers.expert_choice": ("routers.choice.expert_choice",),
    "routers.token_choice": ("routers.choice.token_choice",),
    "routing": ("selection.decision", "selection.tokens", "selection.placement"),
    "sampling": ("generation.sampling",),
    "scheduling": ("generation.scheduling",),
    "sharing": ("recursion.sharing",),
    "step_input": ("recursion.step_input",),
    "tensor_files": ("weights.tensor_files",),
    "tensor_parallel": ("generation.ranks.tensor_parallel",),
    "text_stream": ("generation.text_stream",),
    "thresholds": ("routers.thresholds", "generation.depth.dial", "modules"),
    "transformer": ("models.transformer", "models.layers"),
    "unrolling": ("weights.unrolling",),
    "uptraining": ("weights.uptraining", "weights.names"),
}
"""Old modules of `mor_layers`, and the modules that now have their names."""


def name_of_old_face(name: str) -> Any:
    """The object that `mor_layers` itself used to export as `name`.

    Raises:
        AttributeError: it never exported this name.
    """
    if name not in NAMES:
        raise AttributeError(f"module 'mor_layers' has no attribute {name!r}")
    _say(f"mor_layers.{name}", f"{NAMES[name]}.{name}")
    return getattr(import_module(NAMES[name]), name)


def keep_old_modules(package: str, modules: Mapping[str, Sequence[str]]) -> None:
    """Make `package.old` importable for each old name, as the modules that replaced it.

    Args:
        package: the package that had the modules.
        modules: for each old name, the modules in the package that now have its contents.
    """
    own = {
        f"{package}.{old}": [f"{package}.{new}" for new in places]
        for old, places in modules.items()
    }
    sys.meta_path.append(_OldModules(own))


class _OldModules(MetaPathFinder, Loader):
    """Finds a module under its old name after all other finders have failed."""

    def __init__(self, places: Mapping[str, Sequence[str]]) -> None:
        self.places = places

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.places else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _OldModule(spec.name, self.places[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        return


class _OldModule(ModuleType):
    """Looks up each name where it is now."""

    def __init__(self, name: str, places: Sequence[str]) -> None:
        super().__init__(name)
        self._places = places

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for place in self._places:
                module = import_module(place)
                if hasattr(module, name):
                    _say(f"{self.__name__}.{name}", f"{place}.{name}")
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def _say(old: str, new: str) -> None:
    # The frames in between are those of this file and of importlib, which warnings skips by itself.
    warnings.warn(f"{old} is {new} now", DeprecationWarning, stacklevel=3)
