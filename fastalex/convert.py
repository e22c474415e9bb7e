"""``python -m fastalex.convert``."""

from functools import partial

from fastalex.__main__ import run

main = partial(run, "convert")

if __name__ == "__main__":
    raise SystemExit(main())
