"""The command line: overrides, help, suggestions, process environment.

Nothing heavy may be imported here: all of it is needed before a command's config is composed.
"""
