"""Ranges as a profiler receives them: one is compiled here, and loaded as Nsight loads its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastalex.common import nvtx_ranges
from fastalex.common.nvtx_ranges import annotate_layers, nvtx_range
from tests._commands import environment

# NVTX hands its callbacks to the library that NVTX_INJECTION64_PATH names. This one writes down
# pushes and pops of a domain; handles are the strings themselves.
PROFILER = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
typedef struct {
  uint16_t version, size; uint32_t category; int32_t color_type; uint32_t color;
  int32_t payload_type, reserved; uint64_t payload; int32_t message_type; const char *message;
} Event;
typedef void (*Function)(void);
typedef struct { size_t size; int (*table)(int, Function ***, unsigned *); } Callbacks;
static FILE *out;
static void *same(void *domain, const char *text) { return (void *)text; }
static void *domain(const char *name) { return (void *)name; }
static int push(void *domain, const Event *e) {
  return fprintf(out, "%s push %s\n", (char *)domain, e->message); }
static int pop(void *domain) { return fprintf(out, "%s pop\n", (char *)domain); }
int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t)) {
  const Callbacks *callbacks = export_table(1);
  Function **table; unsigned size;
  out = fopen(getenv("RANGES"), "w");
  if (!out || !callbacks || !callbacks->table(5, &table, &size) || size < 13) return 0;
  *table[4] = (Function)push; *table[5] = (Function)pop;
  *table[10] = (Function)same; *table[12] = (Function)domain;
  return 1;
}
"""

STEP = """
import torch
from fastalex import AlexNet
from fastalex.common.nvtx_ranges import annotate_layers, listening, nvtx_range
assert listening()
torch.set_num_threads(1)
model = AlexNet(2)
annotate_layers(model)
with nvtx_range("step"), nvtx_range("step"):
    model(torch.zeros(1, 3, 64, 64))
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles a profiler with gcc")
def test_a_profiler_sees_every_layer(tmp_path: Path) -> None:
    (tmp_path / "profiler.c").write_text(PROFILER)
    library = tmp_path / "profiler.so"
    build = ["gcc", "-w", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "profiler.c")]
    subprocess.run(build, check=True)
    variables = {"RANGES": str(tmp_path / "log"), "NVTX_INJECTION64_PATH": str(library)}
    subprocess.run([sys.executable, "-c", STEP], env={**environment(), **variables}, check=True)

    events = [line.split(" ", 2) for line in (tmp_path / "log").read_text().splitlines()]
    assert {domain for domain, *_ in events} == {"fastalex"}
    said = [" ".join(rest) for _, *rest in events]
    forward = [line.removeprefix("push ") for line in said if line.startswith("push")]
    assert said[:2] == ["push step"] * 2
    assert said[-2:] == ["pop"] * 2
    assert said.count("pop") == len(forward)
    layers = forward[2:]
    assert [name.split()[0] for name in layers] == [
        *(f"features.{i}" for i in (0, 2, 3, 5, 6, 8, 10, 12)),
        "avgpool",
        *(f"classifier.{i}" for i in (1, 4, 6)),
    ]
    assert layers[0] == "features.0 Conv2dReLU"


def test_without_a_profiler_layers_get_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    monkeypatch.setattr(nvtx_ranges, "listening", lambda: False)
    annotate_layers(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # The same model under a profiler does get them, so the line above looks in the right place.
    monkeypatch.setattr(nvtx_ranges, "listening", lambda: True)
    annotate_layers(model)
    assert all(m._forward_hooks and m._forward_pre_hooks for m in model)
    model(torch.zeros(1, 2))


def test_a_range_passes_exceptions_on() -> None:
    with pytest.raises(KeyError), nvtx_range("a"), nvtx_range("a"):
        raise KeyError("x")
