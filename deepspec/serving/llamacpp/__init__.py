"""llama.cpp's server, found or set up, started, measured.

`environment.py` finds it, `launch.py` starts it, `costs.py` measures what a round takes and says whether to draft,
`law.py` tests what it samples, `record.py` and `table.py` keep and show the figures, `check.py` runs all of it.
"""
