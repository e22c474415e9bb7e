"""``python -m fastalex.ablate``."""

from functools import partial

from fastalex.__main__ import run

main = partial(run, "ablate")

if __name__ == "__main__":
    raise SystemExit(main())
