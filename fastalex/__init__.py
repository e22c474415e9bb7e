"""fastalex: the AlexNet of 2012, two towers and all, on Triton kernels written for it."""

from fastalex import interrupts

if interrupts.command_line_starts():
    interrupts.end_quietly()

from fastalex._version import __version__
from fastalex.model import AlexNet

__all__ = ["AlexNet", "__version__"]
