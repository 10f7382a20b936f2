"""Drafters: one file an algorithm, each with its training network and its way to propose."""
