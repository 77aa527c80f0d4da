"""Training and everything around it: the command line, Ray Train, DeepSpeed, run folders."""

from cluster.environment import set_defaults

set_defaults()  # before anything here imports Ray, which reads them then
