"""The command line: models by name, tables, the demo.

Words enter, tables and files leave; all work is done by the public functions. Nothing imports it.
"""
