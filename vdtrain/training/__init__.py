"""Training: the ZeRO engine, checkpoints, averaged weights, and the loop that uses them."""
