"""Properties of devices and of the links between them."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """A device and its links to others."""

    name: str
    tflops: float
    """Peak throughput of dense matrix products at the training precision, in 1e12 FLOP/s."""
    memory_gib: float
    """Memory of a device in GiB."""
    intra_gbps: float
    """Bandwidth from a device to others of its node, in 1e9 bytes/s."""
    inter_gbps: float
    """Bandwidth from a device to other nodes, in 1e9 bytes/s."""
    per_node: int = 8
    """Number of devices per node."""

    def __post_init__(self) -> None:
        for name in ("tflops", "memory_gib", "intra_gbps", "inter_gbps", "per_node"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and finite.")


HARDWARE = {
    h.name: h
    for h in (
        Hardware("a100", 312, 80, 300, 25),  # NVLink 3, one direction; HDR 200 Gb/s per device
        Hardware("h100", 989, 80, 450, 50),  # SXM; NVLink 4; NDR 400 Gb/s
        Hardware("b200", 2250, 180, 900, 50),  # NVLink 5; NDR 400 Gb/s
        Hardware("cpu", 0.05, 4, 5, 1, 1),  # one core per process
    )
}
"""Published peaks of dense bf16 products and of links. Those of the CPU are rough guesses, to plan
small runs on it."""

FP32_TFLOPS = {"a100": 19.5, "h100": 67, "b200": 80, "cpu": 0.05}
"""Published fp32 peaks without tensor cores. PyTorch does not use them for fp32 by default."""
