"""A checked data set and its exact optimizer steps: read, cut into device batches, decoded, loaded."""
