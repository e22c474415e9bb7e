"""``python -m fastalex.predict``."""

from fastalex.evaluation.predict import main

if __name__ == "__main__":
    raise SystemExit(main())
