"""Training system for Versatile Diffusion: one diffusion model for text and images, trained flow by flow.

Start at `cli.py` for the commands, `pipeline.py` for a trained model in Python, `training/trainer.py` for training.
"""
