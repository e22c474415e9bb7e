"""Files, command lines, signals, timing and provenance: what every room uses."""
