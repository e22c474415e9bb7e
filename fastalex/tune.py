"""``python -m fastalex.tune``."""

from functools import partial

from fastalex.__main__ import run

main = partial(run, "tune")

if __name__ == "__main__":
    raise SystemExit(main())
