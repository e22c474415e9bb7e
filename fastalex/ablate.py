"""``python -m fastalex.ablate``."""

from fastalex.evaluation.ablate import main

if __name__ == "__main__":
    raise SystemExit(main())
