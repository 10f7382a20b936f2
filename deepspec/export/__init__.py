"""From a trained draft to the directory that a serving engine loads, and the proof that it is the same draft."""
