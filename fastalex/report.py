"""``python -m fastalex.report``."""

from fastalex.__main__ import run

if __name__ == "__main__":
    raise SystemExit(run("report"))
