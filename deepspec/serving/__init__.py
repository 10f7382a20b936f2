"""The proof of an export: an engine that we did not write serves it, and accepts as many tokens as our own does.

`environment.py` finds or sets up the engine, `launch.py` starts it, `protocols.py` speaks to it, `ours.py` decodes the
same prompts here, `record.py` compares, `check.py` is `deepspec serve-check`.
"""
