"""From structures in any format to Arrow tables and rows. Imports nothing of torch or of the model."""
