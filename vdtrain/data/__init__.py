"""From tar shards to batches of image-text pairs; knows no model."""
