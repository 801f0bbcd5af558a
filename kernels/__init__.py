"""Triton kernels, one file per operation: jit functions and the launchers that check, allocate and launch.

Installed as semimoe_fast.kernels. No autograd, no choice of backend, no policy: those stand in semimoe_fast.ops. Triton
is optional: this module imports without it.
"""
