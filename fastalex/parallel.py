"""One net over several processes."""

from fastalex.distributed.towers import parallelize

__all__ = ["parallelize"]
