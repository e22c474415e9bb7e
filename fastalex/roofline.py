"""``python -m fastalex.roofline``."""

from fastalex.inspection.roofline import main

if __name__ == "__main__":
    raise SystemExit(main())
