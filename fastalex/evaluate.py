"""``python -m fastalex.evaluate``."""

from fastalex.evaluation.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
