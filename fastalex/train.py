"""``python -m fastalex.train``."""

from functools import partial

from fastalex.__main__ import run

main = partial(run, "train")

if __name__ == "__main__":
    raise SystemExit(main())
