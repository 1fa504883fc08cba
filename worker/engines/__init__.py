"""Engines: what turns prompts into tokens. `base` is the interface, `registry` finds one by name."""
