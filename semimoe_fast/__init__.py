"""Semi-MoE (arXiv 2509.13834): semi-supervised segmentation with a mixture of three experts, made fast.

    from semimoe_fast import functional as F      the operations
    from semimoe_fast.model import SemiMoE        the network
    python -m semimoe_fast.train --help           training; also evaluate, predict and info

Importing the package alone imports nothing heavy.
"""

from __future__ import annotations

import pkgutil

__version__ = "0.1.0"

# In a checkout, Python run from its root finds this folder before the installed package, which alone has
# semimoe_fast.kernels. With its path extended the package is both.
__path__ = pkgutil.extend_path(__path__, __name__)
