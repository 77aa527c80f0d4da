"""Compiles the attention kernels before the tests begin: ``python -m tests.warm_up``, as .ci/run does.

Half a minute on a clean clone. Without it every process of the tests that comes to them before they are kept compiles
them by itself, several at once.
"""

from crystalformer import Crystalformer, ModelConfig

if __name__ == "__main__":
    Crystalformer(ModelConfig(num_layers=1), backend="numba").warm_up()
