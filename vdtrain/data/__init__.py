"""From indexed tar shards to batches: order, decoding, captions, cached latents.

Start at `stream.py`; `batch.py` names what the trainer asks of any stream.
"""
