"""Training and everything around it: the command line, Ray Train, DeepSpeed, run folders.

Each folder imports only those named before it: settings, run, data, worker, prediction, driver, commands. The modules
beside them serve all; cli.py and head.py are what users start.
"""

from cluster.environment import set_defaults

set_defaults()  # before anything here imports Ray, which reads them then
