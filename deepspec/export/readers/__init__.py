"""Small readers of export directories, written from each engine's own conventions: plain torch, nothing of ours.

A reader takes a `Directory` and a sample (tokens, anchors, the target's states) and says what the engine would make of
them: which target layers it reads, which positions and tokens, and the logits of every drafted place.
"""
