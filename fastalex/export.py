"""``python -m fastalex.export``."""

from functools import partial

from fastalex.__main__ import run

main = partial(run, "export")

if __name__ == "__main__":
    raise SystemExit(main())
