"""From structures in any format to Arrow tables and rows. Imports nothing of torch or of the model.

formats reads files and texts, sources yield the rows of a data set, steps do what prepare.py takes one after another.
"""
