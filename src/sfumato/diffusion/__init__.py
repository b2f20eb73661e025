"""Latent diffusion under MPC: schedulers as public coefficients, and diffusers pipelines run on shares."""
