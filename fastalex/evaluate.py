"""``python -m fastalex.evaluate``."""

from functools import partial

from fastalex.__main__ import run

main = partial(run, "evaluate")

if __name__ == "__main__":
    raise SystemExit(main())
