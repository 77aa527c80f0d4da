"""The settings of a run: typed, checked, each default once."""
