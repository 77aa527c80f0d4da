"""The numba backend of real-space periodic attention, for CPUs. Importing this package imports numba.

Kernels in kernels.py and radial.py, written with the vectors of simd.py; which pairs of atoms meet in pairs.py; a
layer's forward and backward, dealt to threads, in passes.py; the operator in custom_op.py. Whole encoder blocks
(crystalformer/fused.py), with products.py beside the kernels, in block.py and block_gradient.py; all in encoder.py.
"""

from crystalformer.ops.numba.custom_op import attend, kernels_of, plan, refusal

__all__ = ["attend", "kernels_of", "plan", "refusal"]
