"""The training engine: flat buffers, replicated, partitioned or under DeepSpeed ZeRO; AdamW, EMA.

Start at `engine.py`. Its strategies are in `flat.py` and, with DeepSpeed, in `strategies.py`.
"""
