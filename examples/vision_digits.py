"""An image classifier that computes some patches deeper than others: MoR over a torch encoder.

    python examples/vision_digits.py [number of epochs] [picture to write]

Trains on scikit-learn's 1797 handwritten digits, 8 x 8 pixels, and writes a picture of test images
beside the number of steps that each patch took. The encoder sees all patches at once, so
expert-choice selects the same way in training and in use.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from mor_layers import ExpertChoice, RecursionBlock, RecursionOutput
from mor_layers.layers import EncoderLayers

STEPS = 3


class RecursiveClassifier(nn.Module):
    """Patches of 2 x 2 pixels, one encoder layer that recurs, the mean of all patches.

    Args:
        hidden_size: width, a multiple of 4 heads.
        side: of the square images, in pixels.
    """

    def __init__(self, hidden_size: int = 48, side: int = 8) -> None:
        super().__init__()
        self.side = side // 2
        """Of the square of patches."""
        self.patches = nn.Conv2d(1, hidden_size, kernel_size=2, stride=2)
        self.places = nn.Parameter(0.5 * torch.randn(self.side**2, 1, hidden_size))
        layer = nn.TransformerEncoderLayer(
            hidden_size, 4, 2 * hidden_size, dropout=0.0, activation="gelu", norm_first=True
        )
        # Nothing is generated one by one, so nothing has to foresee the selection.
        router = ExpertChoice(alpha=1.0, predictor_coefficient=0.0).build(hidden_size, STEPS)
        self.recursion = RecursionBlock(EncoderLayers([layer]), router)
        self.head = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, 10))

    def forward(
        self, images: Float[Tensor, "b y x"]
    ) -> tuple[Float[Tensor, "b 10"], RecursionOutput]:
        """Logits of the ten digits, and who ran each step."""
        patches = self.patches(images[:, None]).flatten(2)  # [b y x] -> [b h s]
        output = self.recursion(patches.permute(2, 0, 1) + self.places)
        return self.head(output.hidden.mean(dim=0)), output

    def depth_maps(self, output: RecursionOutput) -> Int[Tensor, "b y x"]:
        """Steps that each patch took, in its place of the image."""
        return output.depths.T.unflatten(1, (self.side, self.side))


@dataclass(frozen=True)
class Digits:
    """Images scaled to [0, 1] and their digits."""

    images: Float[Tensor, "n y x"]
    labels: Int[Tensor, " n"]


def load() -> tuple[Digits, Digits]:
    """Three quarters of each digit to train on, the rest to test."""
    data = load_digits()
    split = train_test_split(
        data.images / 16.0, data.target, test_size=0.25, stratify=data.target, random_state=0
    )
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, split)
    return Digits(train_images.float(), train_labels), Digits(test_images.float(), test_labels)


def train(model: RecursiveClassifier, data: Digits, epochs: int) -> Iterator[float]:
    """Train in batches of 64; yields the mean loss of each epoch in nats."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = -(-len(data.labels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(data.labels)).split(64):
            logits, output = model(data.images[rows])
            loss = F.cross_entropy(logits, data.labels[rows])
            sum(output.losses.values(), loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item() * len(rows)
        yield total / len(data.labels)


@torch.no_grad()
def accuracy(model: RecursiveClassifier, data: Digits) -> float:
    """Share of the images whose digit is the likeliest."""
    return (model(data.images)[0].argmax(dim=1) == data.labels).float().mean().item()


@torch.no_grad()
def draw(model: RecursiveClassifier, data: Digits, path: Path, count: int = 10) -> None:
    """Write a picture of `count` images, and below each the depth of its patches."""
    maps = model.depth_maps(model(data.images[:count])[1])
    figure = Figure(figsize=(count, 2.4), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    shown = []
    for column in range(count):
        axes[0, column].imshow(data.images[column].numpy(), cmap="gray_r")
        depths = axes[1, column].imshow(maps[column].numpy(), cmap="viridis", vmin=1, vmax=STEPS)
        shown.append(depths)
    for axis in axes.flat:
        axis.set_axis_off()
    bar = figure.colorbar(shown[0], ax=axes, shrink=0.5, pad=0.01, ticks=range(1, STEPS + 1))
    bar.set_label("steps")
    figure.savefig(path, dpi=100)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = options.add_argument
    add("epochs", type=int, nargs="?", default=20, help="(default: 20)")
    add("picture", type=Path, nargs="?", default="digit_depths.png", help="file to write")
    chosen = options.parse_args()
    torch.manual_seed(0)
    train_data, test_data = load()
    model = RecursiveClassifier()
    for epoch, loss in enumerate(train(model, train_data, chosen.epochs), start=1):
        if epoch == 1 or epoch % 5 == 0:
            print(
                f"epoch {epoch:3}  loss {loss:.3f}  test accuracy {accuracy(model, test_data):.1%}"
            )
    draw(model, test_data, chosen.picture)
    print(f"depths of ten test images in {chosen.picture}")


if __name__ == "__main__":
    main()
