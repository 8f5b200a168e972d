"""The diffusion process: noise schedule, training objective, sampling."""
