"""The training engine: flat buffers, DeepSpeed ZeRO or replicas, AdamW, EMA.

Start at `engine.py`; `strategies.py` holds what differs between ZeRO and replicas.
"""
