"""Draft directories of other trainers: what each is, in the terms of the drafts that are written here.

One module a style. Each looks at a `config.json` and the names of the weights and says what our own configuration
would be and what our own names are (`Plan`); `recognise` in recognise.py asks them in turn.
"""
