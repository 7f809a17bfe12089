"""What the NoProp family is made of: label embeddings, noise schedules, denoising networks, solvers."""

from onward.algo.forward_only.denoising.codes import EMBEDDINGS, LabelCodes, medoids
from onward.algo.forward_only.denoising.diffusion import (
    NOISE_SCHEDULES,
    Diffusion,
    FixedNoise,
    LearnedNoise,
    NoiseSchedule,
    prior_kl,
    signal_shares,
)
from onward.algo.forward_only.denoising.networks import (
    BatchNorm,
    ChainStack,
    Denoiser,
    Encoder,
    FieldStack,
    TimedDenoiser,
    Trunk,
    denoising_chain,
    match,
    matching_head,
    redraw,
    trunk_of,
)
from onward.algo.forward_only.denoising.refusals import refusal
from onward.algo.forward_only.denoising.solvers import SOLVERS, Field, integrate, mean_class

__all__ = [
    "EMBEDDINGS", "NOISE_SCHEDULES", "SOLVERS", "BatchNorm", "ChainStack", "Denoiser", "Diffusion", "Encoder",
    "Field", "FieldStack", "FixedNoise", "LabelCodes", "LearnedNoise", "NoiseSchedule", "TimedDenoiser",
    "Trunk", "denoising_chain", "integrate", "match", "matching_head", "mean_class", "medoids", "prior_kl", "redraw",
    "refusal", "signal_shares", "trunk_of",
]
