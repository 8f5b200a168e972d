"""Evaluation of a trained model, or of files of another: samples, figures, reports.

Start at `evaluator.py`.
"""
