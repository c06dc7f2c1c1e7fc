"""The mathematics of diffusion by its definitions, in float64 and without the libraries and parts that are tested."""

import numpy as np


def alphas_cumprod(rescaled=False):
    """The schedule of SD 1 by its definition; rescaled to zero terminal SNR by arXiv 2305.08891, algorithm 1."""
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if rescaled:
        roots = np.sqrt(alphas)
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return alphas


def min_snr_weights(prediction_type, timesteps, gamma, rescaled=False):
    """The weights of arXiv 2303.09556, section 3.4, for the schedule of SD 1."""
    alphas = alphas_cumprod(rescaled)[timesteps]
    snr = alphas / (1 - alphas)
    return np.minimum(snr, gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)


def hand_computed(prediction_type, answer, latents, noise, timesteps, rescaled=False):
    """The mean squared error of each sample in float64, from the definitions of epsilon and v (arXiv 2202.00512)."""
    alphas = alphas_cumprod(rescaled)[timesteps.numpy()][:, None, None, None]
    x0, eps = latents.double().numpy(), noise.double().numpy()
    target = np.sqrt(alphas) * eps - np.sqrt(1 - alphas) * x0 if prediction_type == "v_prediction" else eps
    return ((answer.double().numpy() - target) ** 2).mean(axis=(1, 2, 3))
