"""Decoding: the engine, the sampler, the verification rules and the controllers. Pure torch."""
