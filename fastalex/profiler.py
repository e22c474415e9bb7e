"""``python -m fastalex.profiler``."""

from fastalex.tuning.profiler import main

if __name__ == "__main__":
    raise SystemExit(main())
