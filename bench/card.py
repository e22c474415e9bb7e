"""One card of a GPU: what bench/gpu_day.sh measured, as JSON and as a page to read.

    python -m bench.card environment DIR    # device, clocks, versions, commit, a matmul canary
    python -m bench.card write DIR          # DIR/card_DEVICE.json and .md of what is in DIR

What was not measured is "unmeasured": a card is whole at any time.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastalex.common.files import replacing

UNMEASURED = "unmeasured"
RUNS = [
    (gpus, batch, kind) for gpus in (1, 2) for batch in (128, 1024) for kind in ("tf32", "bf16")
]
_CLOCKS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def main(arguments: Sequence[str] = tuple(sys.argv[1:])) -> int:
    """Do one of the two things that the module's docstring names."""
    what, folder = arguments[0], Path(arguments[1])
    content = environment() if what == "environment" else card(folder)
    name = "environment"
    if what != "environment":
        name = "card_" + re.sub(r"[^a-z0-9]+", "-", content["device"].lower()).strip("-")
        _write(folder / f"{name}.md", "\n".join(page(content)) + "\n")
        print("\n".join(page(content)))
    _write(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")
    return 0


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def environment() -> dict[str, Any]:
    """What every number on the card depends on."""
    import torch  # which writing a card does not wait for

    from fastalex.common.provenance import provenance

    from ._report import device
    from ._timing import Rates

    found: dict[str, Any] = {**provenance(device()), "GPUs": torch.cuda.device_count()}
    try:
        query = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv"]
        found["clocks"] = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        found["clocks"] = UNMEASURED
    found["canary"] = UNMEASURED
    if torch.cuda.is_available():
        rates = Rates.measure(torch.bfloat16)
        found["canary"] = {
            "bf16 matmul TFLOP/s": rates.flops / 1e12,
            "copy GB/s": rates.bytes / 1e9,
        }
    return found


def card(folder: Path) -> dict[str, Any]:
    """What the files of ``folder`` hold, "unmeasured" where one is missing or broken."""
    known = _read(folder / "environment.json") or {}
    rows = {theme: _results(folder, theme) for theme in ("step", "layers")}
    doctor = _read(folder / "doctor.json")
    return {
        "device": known.get("device", UNMEASURED),
        **{k: known.get(k, UNMEASURED) for k in ("date", "commit", "versions", "clocks", "canary")},
        "doctor": UNMEASURED if doctor is None else _doctor(doctor),
        "images/s as trained": {
            f"{gpus} GPU, batch {batch}, {kind}": _rate(folder / f"train_{gpus}_{batch}_{kind}")
            for gpus, batch, kind in RUNS
        },
        "step": [_row(row) for row in rows["step"]] or UNMEASURED,
        "layers": [_row(row) for row in rows["layers"]] or UNMEASURED,
        "steps": _steps(folder),
    }


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a step that was killed may leave anything
        return None


def _results(folder: Path, theme: str) -> list[dict[str, Any]]:
    newest = sorted(folder.glob(f"{theme}_*_??????.json"))[-1:]
    return [row for path in newest for row in (_read(path) or {}).get("results", [])]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    names = ("layer", "direction", "against", "batch", "dtype", "ours ms", "theirs ms", "ratio")
    return {name: row.get(name, UNMEASURED) for name in names}


def _doctor(report: dict[str, Any]) -> dict[str, Any]:
    wrong = [
        f"{r['part']}: {r['what']}: {r['text']}" for r in report["rows"] if r["verdict"] == "wrong"
    ]
    aten = [
        f"{r['part']}: {r['what']}" for r in report["rows"] if r["values"].get("uses") == "aten"
    ]
    return {"looked at": len(report["rows"]), "wrong": wrong, "runs on ATen": aten}


def _rate(folder: Path) -> float | str:
    """The median over the records of a run, the first left out: images/s, data and all."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return UNMEASURED
    rates = [r["images_per_s"] for r in records if r["kind"] == "step" and r["images_per_s"]][1:]
    return statistics.median(rates) if rates else UNMEASURED


def _steps(folder: Path) -> dict[str, str]:
    """How each step of gpu_day.sh ended."""
    try:
        lines = (folder / "gpu_day.steps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return dict(line.split("\t")[:2] for line in lines)  # the last run of a step counts


def page(content: dict[str, Any]) -> list[str]:
    """The card as Markdown."""
    lines = [f"# {content['device']}", ""]
    for name in ("date", "commit", "versions", "clocks", "canary", "doctor"):
        lines.append(f"- {name}: {_shown(content[name])}")
    lines += ["", "| as trained | images/s |", "|---|---|"]
    lines += [f"| {k} | {_shown(v)} |" for k, v in content["images/s as trained"].items()]
    for theme in ("step", "layers"):
        lines += ["", f"## {theme}", ""]
        if content[theme] == UNMEASURED:
            lines.append(UNMEASURED)
            continue
        lines += ["| | | against | ours ms | theirs ms | ratio |", "|---|---|---|---|---|---|"]
        for row in content[theme]:
            cells = ("layer", "direction", "against", "ours ms", "theirs ms", "ratio")
            lines.append(f"| {' | '.join(_shown(row[name]) for name in cells)} |")
    lines += ["", *(f"- {name}: {how}" for name, how in content["steps"].items())]
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 100 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(x)}" for name, x in value.items())
    return ", ".join(map(_shown, value)) or "none" if isinstance(value, list) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
