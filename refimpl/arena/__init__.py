"""Arenas: fixed substrates on which all methods of a family are run side by side.

An arena is a module of this package. A method joins it in its YAML file, `arena: {weights: {bits: [2, 4]}}`; each
combination of the settings given there is one cell. `protocol.py` says what an arena module provides; `runner.py` runs.
"""
