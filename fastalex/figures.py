"""``python -m fastalex.figures``."""

from fastalex.evaluation.figures import main

if __name__ == "__main__":
    raise SystemExit(main())
