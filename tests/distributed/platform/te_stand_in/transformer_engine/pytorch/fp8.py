"""Quantization contexts: they are recorded, and say by which rules inputs are checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from transformer_engine import calls
from transformer_engine.common.recipe import DelayedScaling, MXFP8BlockScaling, NVFP4BlockScaling
from transformer_engine.signatures import recorded


class FP8GlobalStateManager:
    """The context that is entered."""

    recipe: Any = None
    """Its recipe; None outside, or where it is disabled."""
    modules: ClassVar[set[Any]] = set()
    """Modules called within it."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None

    @classmethod
    def check(cls, module: Any, rows: int, *sizes: int) -> None:
        """What Transformer Engine asks of a matrix product of `rows` rows and such dimensions.

        Raises:
            ValueError: numbers that do not divide.
            RuntimeError: what its documentation calls unsupported and does not detect: a module
                called twice within one context under a recipe that reduces amaxes when it is left.
        """
        if cls.recipe is None:
            return
        calls.quantized_rows.append(rows)
        blockwise = isinstance(cls.recipe, MXFP8BlockScaling | NVFP4BlockScaling)
        row_multiple, multiple = (32, 32) if blockwise else (16, 16)
        if rows % row_multiple or any(size % multiple for size in sizes):
            raise ValueError(f"{type(cls.recipe).__name__}: {rows} rows, sizes {sizes}")
        if isinstance(cls.recipe, DelayedScaling) and cls.recipe.reduce_amax:
            if module in cls.modules:
                raise RuntimeError(f"{type(module).__name__} ran twice within one delayed context")
            cls.modules.add(module)


@contextmanager
def fp8_autocast(*args: Any, **kwargs: Any) -> Iterator[None]:
    given = recorded("fp8_autocast").bind(*args, **kwargs).arguments
    recipe = given.get("fp8_recipe") if given.get("enabled", True) else None
    calls.recipes.append(recipe)
    before = FP8GlobalStateManager.recipe, FP8GlobalStateManager.modules
    FP8GlobalStateManager.recipe, FP8GlobalStateManager.modules = recipe, set()
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe, FP8GlobalStateManager.modules = before


@contextmanager
def fp8_model_init(*args: Any, **kwargs: Any) -> Iterator[None]:
    recorded("fp8_model_init").bind(*args, **kwargs)
    yield
