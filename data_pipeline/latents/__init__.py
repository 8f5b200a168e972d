"""The latent cache: every image is encoded once, for runs that train without the image VAE's encoder.

Start at `latents.py`.
"""
