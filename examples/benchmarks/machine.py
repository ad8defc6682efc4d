"""The machine that figures were measured on, for the record that a benchmark writes."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Processor, or GPU, its number of cores or devices, versions, and how busy it was."""
    on_gpu = torch.cuda.is_available()
    return {
        "processor": torch.cuda.get_device_name() if on_gpu else _processor(),
        "cores": torch.cuda.device_count() if on_gpu else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # of the last minute; 1 is this benchmark itself
        "torch": torch.__version__.partition("+")[0],
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    """The name that Linux gives; elsewhere the architecture."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
