"""``python -m fastalex.tune``."""

from fastalex.tuning.tune import main

if __name__ == "__main__":
    raise SystemExit(main())
