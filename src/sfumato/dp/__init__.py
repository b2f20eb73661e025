"""Differentially private fine-tuning of latent diffusion models (DP-LDM), accounted twice and audited.

Independent of the secure-computation layers: nothing here imports them, and a model trained here is an ordinary
diffusers folder that `sfumato.SecurePipeline` loads. Source: Liu et al. 2024, papers/dp-latent-diffusion.
"""
