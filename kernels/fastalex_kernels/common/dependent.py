"""Programmatic dependent launch: a kernel starts while the one before it still ends.

On sm_90 and newer a launch may carry an attribute, Triton's option ``launch_pdl``. Its programs are
then started as soon as every program of the kernel before has called
``griddepcontrol.launch_dependents`` or has ended, where there is place beside them. What is gained
is the time that a launch takes. Of the work nothing may overlap, and nothing does:

* The first statement of each kernel is ``wait_for_predecessor``. A launch with the attribute
  compiles it to ``griddepcontrol.wait``: until the kernel before has ended, and all that it wrote
  is visible. A program reads and writes no memory before; arguments and tensor descriptors are in
  the launch itself. Warps that only fetch, in Gluon's kernel, start at a barrier behind the wait.
* When a launch has ended, everything before it in its stream has. By induction: without the
  attribute it started after all that; with it, it ended after its wait, which is after the end of
  the launch before it, of which the same holds. So it is enough to wait for one launch, whatever
  an older one wrote or read: no read comes before its write, no write before an older read.
* That needs a launch before it of which it holds. ``Program`` gives the attribute only to a launch
  that follows another of ours in its list. After a function of torch's or an exchange, which may
  copy memory, wait for an event or start kernels that do not wait, and at the start of a step, a
  launch starts as ever. What torch does outside of the list, such as filling new memory while a
  step is recorded, starts as ever, too, so of it the same holds. The public functions never use
  the attribute: what stands before them is not known.
* The same kernels let the next one start, right after their wait. It waits, too, or it starts as
  ever, which is after their end. No third launch starts beside two others: the second lets it
  only after its own wait.
* A program that waits holds its place (registers, shared memory, on sm_100 tensor memory), but none
  that its predecessor needs: all programs of that have begun by then. Nor can it stop kernels of
  another stream for ever: what it waits for waits for no other stream.
* An event recorded after a launch comes after its end, and a captured graph holds the attribute as
  an edge between two kernels; the graphs of two steps follow each other whole.

Sources: PTX ISA, griddepcontrol. CUDA Programming Guide 4.5. cuda.h: the attribute allows a grid
"to overlap with the previous kernel in the stream, if that kernel requests the overlap", and
CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC. Compilers have moved loads above the wait elsewhere
(github.com/ggml-org/llama.cpp 23825, github.com/triton-lang/triton 11905), so a test reads the
machine code of every launch of a step.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl


def wait_for_predecessor(_semantic: Any = None) -> None:
    """Wait for the kernel before, where this one may start early, and let the next one start.

    It is nothing where a launch is without the attribute, and in the interpreter, which hands over
    no ``_semantic``.
    """
    options = None if _semantic is None else _semantic.builder.options
    if getattr(options, "launch_pdl", False):
        tl.extra.cuda.gdc_wait(_semantic=_semantic)
        tl.extra.cuda.gdc_launch_dependents(_semantic=_semantic)


setattr(wait_for_predecessor, tl.core.TRITON_BUILTIN, True)
