"""``python -m fastalex.profiler``."""

from functools import partial

from fastalex.__main__ import run

main = partial(run, "profiler")

if __name__ == "__main__":
    raise SystemExit(main())
