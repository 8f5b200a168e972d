"""The network and the frozen parts around it: layers by group, image VAE, text VAE and CLIP contexts.

Start at `diffuser.py`; `frozen.py` turns pairs into latents and contexts.
"""

import logging

# diffusers imports xformers, which warns about kernels that it cannot load. No setting uses those by default.
logging.getLogger("xformers").setLevel(logging.ERROR)
