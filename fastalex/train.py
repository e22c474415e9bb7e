"""``python -m fastalex.train``."""

from fastalex.__main__ import run

if __name__ == "__main__":
    raise SystemExit(run("train"))
