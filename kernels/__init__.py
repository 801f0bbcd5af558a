"""Triton kernels, one file per operation: jit functions and the launchers that check, allocate and launch.

Installed as semimoe_fast.kernels. Autograd and the choice of a backend are in semimoe_fast.ops. This module imports
without Triton.
"""
