"""Decoding: the engine, the sampler, the verification rules and the controllers. Pure torch."""

from deepspec.decoding.engine import generate, stream
from deepspec.decoding.request import Generation, Request, Sampling, Stats

__all__ = ["Generation", "Request", "Sampling", "Stats", "generate", "stream"]
