"""Programmatic dependent launch: a kernel starts while the one before it still ends.

On sm_90 and newer a launch may carry an attribute, Triton's option ``launch_pdl``. Its programs are
then started as soon as every program of the kernel before has called
``griddepcontrol.launch_dependents`` or has ended, and as there is place beside them. What is gained
is the time that a launch takes. Of the work nothing may overlap, for these reasons:

* Each kernel's first statement is ``wait_for_predecessor``. A launch with the attribute compiles it
  to ``griddepcontrol.wait``: until the kernel before has ended, and all it wrote is visible. Before
  that no program reads or writes memory that another launch knows; arguments and tensor descriptors
  are in the launch itself.
* So a launch ends after everything before it in its stream has. One without the attribute starts
  after that; one with it ends after its own wait, which is after the end of the one before, of
  which the same holds. It is enough to wait for one kernel, whatever an older one wrote or still
  reads: no read before its write, no write before an older read or write.
* The chain has no gap, as ``Program`` gives the attribute only to a launch that follows another of
  our launches in its list. After a function of torch's or an exchange, which may copy memory, wait
  for an event or start kernels that do not wait, and at the start of a step, a launch starts as
  ever. The public functions never use the attribute: what they run between is not known.
* The next kernel is let start right after the wait, by the same kernels only. It is ours and waits,
  or starts without the attribute, which is after our end. A third one can't start: the second lets
  it only after its own wait.
* A program that waits holds its place, but not one that its predecessor needs: all programs of that
  have started by then. Nor does it stop kernels of another stream for ever: what it waits for waits
  for nobody.

Sources: PTX ISA, griddepcontrol; CUDA Programming Guide 4.5; CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_
STREAM_SERIALIZATION in cuda.h, "to overlap with the previous kernel in the stream, if that kernel
requests the overlap"; in a captured graph its edge is CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC.
Compilers moved loads above the wait elsewhere (ggml-org/llama.cpp 23825, triton-lang/triton 11905):
a test looks for that in the machine code of every launch of a step.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl


def wait_for_predecessor(_semantic: Any = None) -> None:
    """Wait for the kernel before, where this one may start early, and let the next one start.

    The first statement of every kernel that is launched. Nothing in any other launch, and in the
    interpreter, which hands over no ``_semantic``.
    """
    options = None if _semantic is None else _semantic.builder.options
    if getattr(options, "launch_pdl", False):
        tl.extra.cuda.gdc_wait(_semantic=_semantic)
        tl.extra.cuda.gdc_launch_dependents(_semantic=_semantic)


setattr(wait_for_predecessor, tl.core.TRITON_BUILTIN, True)
