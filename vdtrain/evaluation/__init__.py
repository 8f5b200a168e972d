"""Evaluation of a trained model: samples, FID, CLIP scores, reports.

Start at `evaluator.py`.
"""
