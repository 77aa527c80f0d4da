"""The steps of preparing a data set, which prepare.py takes one after another."""
