"""The numba backend of real-space periodic attention, for CPUs. Importing this package imports numba.

Kernels in kernels.py, radial.py and widths.py, written with the vectors of simd.py; which pairs of atoms meet in
pairs.py; memory and threads in launch.py; the operator in custom_op.py, a whole encoder block in block.py.
"""

from crystalformer.ops.numba.custom_op import attend, plan, refusal

__all__ = ["attend", "plan", "refusal"]
