"""Training and everything around it: the command line, Ray Train, DeepSpeed, run folders."""
