"""From a prepared data set to the batches of each worker."""
