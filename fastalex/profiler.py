"""``python -m fastalex.profiler``."""

from fastalex.__main__ import run

if __name__ == "__main__":
    raise SystemExit(run("profiler"))
