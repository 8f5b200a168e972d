"""The diffuser (trained) and the frozen parts around it: image VAE, text VAE, CLIP contexts."""
