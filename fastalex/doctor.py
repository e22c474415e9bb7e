"""``python -m fastalex.doctor``."""

from functools import partial

from fastalex.__main__ import run

main = partial(run, "doctor")

if __name__ == "__main__":
    raise SystemExit(main())
