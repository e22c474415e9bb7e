"""``python -m fastalex.train``."""

from fastalex.training.train import main

if __name__ == "__main__":
    raise SystemExit(main())
