"""``python -m fastalex.figures``."""

from functools import partial

from fastalex.__main__ import run

main = partial(run, "figures")

if __name__ == "__main__":
    raise SystemExit(main())
