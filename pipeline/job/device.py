"""Whether the device that is asked for can be used."""

from __future__ import annotations

import torch

from pipeline.errors import NoDevice
from pipeline.job.metrics import gpu_driver, gpu_name

DRIVERS = {"12": "525", "13": "580"}  # by CUDA's major version


def check_device(setting: str, device: torch.device, on_runpod: bool) -> None:
    """Raise NoDevice where a GPU was asked for or is paid for and cannot be used: driver found, driver needed."""
    if device.type == "cuda" and torch.cuda.is_available():
        return
    name, driver = gpu_name(), gpu_driver()
    if setting == "cpu" or (setting == "auto" and not on_runpod and name is None):
        return
    found = f"{name}, driver {driver}" if name else "no NVIDIA driver"
    major = (torch.version.cuda or "").partition(".")[0]
    needed = f"needs driver {DRIVERS.get(major, f'of CUDA {major}')} or newer" if major else "is built without CUDA"
    raise NoDevice(f"DEVICE={setting}: the GPU cannot be used: found {found}; torch {torch.__version__} {needed}. DEVICE=cpu "
                   "runs without a GPU", stage="inference", driver=driver, gpu=name)
