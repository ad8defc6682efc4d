"""Where figures and numbers go beside the page: TensorBoard, and Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy
from torch import Tensor

WandbMode = Literal["online", "offline"]


class Tracker(Protocol):
    """Takes numbers and pictures (`[height width 3]`) of a step."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def images(self, pixels: Mapping[str, numpy.ndarray], step: int) -> None: ...

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """TensorBoard files in a folder.

    Args:
        purge_step: steps from this one on, of an earlier session, are not shown; None: all are.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, pixels: Mapping[str, numpy.ndarray], step: int) -> None:
        for name, image in pixels.items():
            self._writer.add_image(name, image, step, dataformats="HWC")

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        for name, numbers in values.items():
            self._writer.add_histogram(name, numbers, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases.

    Args:
        project: of wandb.
        folder: where wandb keeps its files; a run that goes on there is the same run to wandb.
        mode: `offline` keeps everything in `folder`, for `wandb sync`.
        name: of the run.
        settings: of the run, to be shown beside it.

    Raises:
        ValueError: wandb refuses, for instance because nobody is logged in.
    """

    def __init__(
        self,
        project: str,
        folder: Path,
        mode: WandbMode = "online",
        name: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        identity = folder / "wandb-id"
        known = identity.read_text("utf-8").strip() if identity.exists() else None
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=known,
                resume="allow" if known else None,
                dir=str(folder),
                mode=mode,
                config=dict(settings or {}),
            )
        except wandb.Error as error:
            raise ValueError(
                f"wandb cannot start project {project!r}: {error}. Log in with `wandb login`, or "
                "keep the run here with mode offline."
            ) from error
        identity.write_text(self._run.id + "\n", "utf-8")
        # An axis of its own: wandb's must never go back, ours does where a run is resumed.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def images(self, pixels: Mapping[str, numpy.ndarray], step: int) -> None:
        import wandb

        self._run.log({name: wandb.Image(image) for name, image in pixels.items()} | {"step": step})

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None:
        import wandb

        named = {name: wandb.Histogram(numbers.tolist()) for name, numbers in values.items()}
        self._run.log({**named, "step": step})

    def close(self) -> None:
        self._run.finish()
