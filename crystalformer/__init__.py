"""Crystalformer as a plain torch library: no Ray, no DeepSpeed."""
