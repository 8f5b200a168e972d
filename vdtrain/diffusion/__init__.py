"""The diffusion process: losses of all flows, noise schedule, samplers, context mixing and image editing.

Start at `objective.py` for training, at `sampling.py` for generation.
"""
