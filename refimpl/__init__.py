"""Reference implementations of the methods in the taxonomy, one module each, at the same place in the tree.

Importing this package brings in nothing; `taxonomy.load().methods["rtn"].load()` imports one implementation.
"""
