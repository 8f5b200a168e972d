"""The diffuser (trained) and the frozen parts around it: image VAE, text VAE, CLIP contexts."""

import logging

# diffusers imports xformers, which warns of kernels that it cannot load; none is used unless it is asked for.
logging.getLogger("xformers").setLevel(logging.ERROR)
