"""Configs, which Hydra finds by hydra.searchpath=[pkg://stripes.conf]."""
