"""``python -m fastalex.roofline``."""

from functools import partial

from fastalex.__main__ import run

main = partial(run, "roofline")

if __name__ == "__main__":
    raise SystemExit(main())
