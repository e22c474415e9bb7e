"""What a measurement depends on: versions, commit and device, to be kept beside its numbers."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fastalex._version import __version__


def versions() -> dict[str, str]:
    """What the numbers of a run may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "fastalex": __version__,
    }


def commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "--error-unmatch", Path(__file__).name):
            return None
        changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return None


def host_cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def device_name(device: torch.device) -> str:
    """What a measurement on ``device`` ran on: the GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else host_cpu()


def provenance(device: torch.device) -> dict[str, Any]:
    """Everything that belongs beside a measurement on ``device``, as plain data."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "device": device_name(device),
        "host cpu": host_cpu(),
        "threads": torch.get_num_threads(),
        "versions": {**versions(), "cuda": torch.version.cuda, "hip": torch.version.hip},
    }
