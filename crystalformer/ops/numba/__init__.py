"""The numba backend of real-space periodic attention, for CPUs. Importing this package imports numba.

Kernels in kernels.py, written with the vectors of simd.py; which pairs of atoms meet in pairs.py; the operator, its
gradient and the threads in launch.py.
"""

from crystalformer.ops.numba.launch import attend, plan, refusal

__all__ = ["attend", "plan", "refusal"]
