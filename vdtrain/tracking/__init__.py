"""What a run tells: figures, log lines, W&B and TensorBoard, its speed and its progress.

Start at `metrics.py`, which writes every figure; `reporting.py` prints.
"""
