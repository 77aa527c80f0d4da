"""Compiles the CPU's kernels before the tests begin: ``python -m tests.warm_up``, as .ci/run does.

A minute on a clean clone. Without it every process of the tests that comes to them before they are kept compiles
them by itself, several at once.
"""

from crystalformer import Crystalformer, ModelConfig

if __name__ == "__main__":
    model = Crystalformer(ModelConfig(num_layers=1), backend="numba")
    model.warm_up()
    model.blocks[0].register_forward_hook(lambda *_: None)  # which has the attention's own operator computed with
    model.warm_up()
