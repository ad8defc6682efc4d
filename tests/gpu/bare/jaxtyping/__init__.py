"""Stands for jaxtyping on a bare machine: the array types of annotations, which nothing checks there."""

from typing import Any


class Float:
    """`Float[Tensor, "k b h"]` is `Tensor`."""

    def __class_getitem__(cls, parameters: tuple[Any, str]) -> Any:
        return parameters[0]


Bool = Float64 = Int = Float
