"""Semi-MoE (arXiv 2509.13834): fast semi-supervised segmentation with a mixture of three experts.

    from semimoe_fast import functional as F          the operations
    from semimoe_fast.model import SemiMoE            the network
    with semimoe_fast.backend("reference"): ...       choose how the operations compute
    python -m semimoe_fast.train --help               training; also evaluate, predict, export, prepare, synthetic, info

Importing the package alone does not import torch.
"""

from __future__ import annotations

import itertools
import pkgutil
import signal
import sys
from typing import Any

__version__ = "0.1.0"

# In a checkout, Python finds this folder before the installed package, but only the installed package contains
# semimoe_fast.kernels. The extended path covers both.
__path__ = pkgutil.extend_path(__path__, __name__)

# Ctrl-C ends a command (python -m semimoe_fast.train) silently while it imports torch, and not with a long traceback;
# errors.run_command restores Python's handler.
_module = dict(itertools.pairwise(sys.orig_argv)).get("-m", "")
if _module.startswith(f"{__name__}.") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def __getattr__(name: str) -> Any:
    """Import `backend` on first use, because it needs torch."""
    if name == "backend":
        from .ops import backend

        return backend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
