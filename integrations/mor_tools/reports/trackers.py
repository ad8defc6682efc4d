"""Experiment trackers: TensorBoard, and Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy
from torch import Tensor

WandbMode = Literal["online", "offline"]


class Tracker(Protocol):
    """Records scalars, images (`[height width 3]`) and histograms of a step."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def images(self, pixels: Mapping[str, numpy.ndarray], step: int) -> None: ...

    def histograms(self, values: Mapping[str, Tensor], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Writes TensorBoard files into a folder.

    Args:
        purge_step: hide this step and later ones of earlier sessions. None: hide none.
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
        project: the wandb project.
        folder: the folder for wandb's files. A run that resumes in the same folder is the same run
            for wandb.
        mode: `offline` stores everything in `folder`, for `wandb sync`.
        name: name of the run.
        settings: settings of the run, which wandb shows with it.

    Raises:
        ValueError: wandb cannot start, for example because the user is not logged in.
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
                "store the run locally with mode='offline'."
            ) from error
        identity.write_text(self._run.id + "\n", "utf-8")
        # wandb's own step must never decrease, but ours does when a run resumes from an earlier
        # checkpoint. So our step is a metric and is used as the axis.
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
