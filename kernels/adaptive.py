"""The adaptive multi-objective loss of T terms and T log-variances. Forward and backward are one launch each.

    total = sum over j of c_j exp(-s_j) L_j + r exp(s_j)
    dL_j = c_j exp(-s_j) dtotal,    ds_j = (r exp(s_j) - c_j exp(-s_j) L_j) dtotal

Memory traffic is a few bytes, so the number of launches decides the time; PyTorch's operators need a dozen. One program
computes all, unrolled over the terms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def adaptive_loss_fwd_kernel(
    terms,  # (T,)
    log_vars,  # (T,)
    total,  # () out
    coefficients,  # T numbers
    regularizer,
):
    result = 0.0
    for j in tl.static_range(len(coefficients)):
        s = tl.load(log_vars + j).to(tl.float32)
        term = tl.load(terms + j).to(tl.float32)
        result += coefficients[j] * tl.exp(-s) * term + regularizer * tl.exp(s)
    tl.store(total, result)


@triton.jit
def adaptive_loss_bwd_kernel(
    grad_output,  # ()
    terms,  # (T,)
    log_vars,  # (T,)
    grad_terms,  # (T,) out
    grad_log_vars,  # (T,) out
    coefficients,
    regularizer,
):
    gradient = tl.load(grad_output).to(tl.float32)
    for j in tl.static_range(len(coefficients)):
        s = tl.load(log_vars + j).to(tl.float32)
        term = tl.load(terms + j).to(tl.float32)
        weight = coefficients[j] * tl.exp(-s)
        tl.store(grad_terms + j, gradient * weight)
        tl.store(grad_log_vars + j, gradient * (regularizer * tl.exp(s) - weight * term))


def forward(terms: Tensor, log_vars: Tensor, coefficients: Sequence[float], regularizer: float) -> Tensor:
    """terms (T,), log_vars (T,), T coefficients, a number -> total () float32."""
    total = torch.empty((), dtype=torch.float32, device=terms.device)
    with torch.cuda.device_of(terms):
        adaptive_loss_fwd_kernel[(1,)](terms, log_vars, total, tuple(coefficients), regularizer, num_warps=1)
    return total


def backward(
    grad_output: Tensor, terms: Tensor, log_vars: Tensor, coefficients: Sequence[float], regularizer: float
) -> tuple[Tensor, Tensor]:
    """grad_output (), and the arguments of `forward` -> gradients of terms and log_vars, in their dtypes."""
    gradients = torch.empty_like(terms), torch.empty_like(log_vars)
    with torch.cuda.device_of(terms):
        adaptive_loss_bwd_kernel[(1,)](
            grad_output, terms, log_vars, *gradients, tuple(coefficients), regularizer, num_warps=1
        )
    return gradients
