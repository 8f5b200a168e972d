"""Pages that a person reads: the report of a run, and the blind comparison of two sets of samples."""
