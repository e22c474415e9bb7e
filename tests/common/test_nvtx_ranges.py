"""Ranges as a profiler receives them: one is compiled here, and loaded as Nsight loads its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastalex.common.nvtx_ranges import nvtx_range
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
from fastalex.common.nvtx_ranges import listening, nvtx_range
assert listening()
with nvtx_range("step"), nvtx_range("step"), nvtx_range("data"):
    pass
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles a profiler with gcc")
def test_a_profiler_sees_ranges(tmp_path: Path) -> None:
    (tmp_path / "profiler.c").write_text(PROFILER)
    library = tmp_path / "profiler.so"
    build = ["gcc", "-w", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "profiler.c")]
    subprocess.run(build, check=True)
    variables = {"RANGES": str(tmp_path / "log"), "NVTX_INJECTION64_PATH": str(library)}
    subprocess.run([sys.executable, "-c", STEP], env={**environment(), **variables}, check=True)

    events = [line.split(" ", 2) for line in (tmp_path / "log").read_text().splitlines()]
    assert {domain for domain, *_ in events} == {"fastalex"}
    pushed = ["push step", "push step", "push data"]
    assert [" ".join(rest) for _, *rest in events] == [*pushed, "pop", "pop", "pop"]


def test_a_range_passes_exceptions_on() -> None:
    with pytest.raises(KeyError), nvtx_range("a"), nvtx_range("a"):
        raise KeyError("x")
