"""Semi-MoE beside other methods of semi-supervised segmentation, all trained and scored by the same code.

docs/accuracy.md has the protocol and the commands.
"""
