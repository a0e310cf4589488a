"""Which device the batch side runs on; nothing falls back in silence."""

from __future__ import annotations

import torch

from rb_gpu.errors import ConfigError


def resolve_device(kind: str) -> torch.device:
    """The torch device of `device.kind`: auto takes CUDA where there is one. Raises ConfigError where it is missing."""
    if kind not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={kind} is not one of auto, cpu, cuda; choose one of them")
    available = torch.cuda.is_available()
    if kind == "cuda" and not available:
        built = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else (f"torch {torch.__version__} is a CPU build")
        )
        raise ConfigError(
            f"device=cuda, but no CUDA device is available ({built}); install the driver and a CUDA build "
            "(pip install rb_gpu[gpu]), or set device=cpu"
        )
    return torch.device("cuda" if kind == "cuda" or (kind == "auto" and available) else "cpu")
