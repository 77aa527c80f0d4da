"""The Triton backend of real-space periodic attention. Importing this package imports triton; crystalformer does not.

Kernels in kernels.py, checks and launches in launch.py, compilation without a GPU in aot.py.
"""

from crystalformer.ops.triton.launch import attend, refusal
from crystalformer.ops.triton.rows import rows_of as plan

__all__ = ["attend", "plan", "refusal"]
