"""``python -m fastalex.predict``."""

from functools import partial

from fastalex.__main__ import run

main = partial(run, "predict")

if __name__ == "__main__":
    raise SystemExit(main())
