"""Execute the machine code of a CUDA kernel on the CPU, one instruction at a time, and count the instructions.

`Program` reads the disassembly of sm_90 code, `Machine` executes it. An instruction counts once for each warp that
issues it, whatever the number of active lanes. Only the instructions are implemented that the kernels of csrc/ use for
the images of the tests; any other one raises NotImplementedError. NVIDIA documents few of them, so check the results: a
wrong guess shows in them. Estimates such as MUFU and fused sums may differ from the hardware's in the last bit.
"""

from .machine import LANES, Machine
from .program import Program

__all__ = ["LANES", "Machine", "Program"]
