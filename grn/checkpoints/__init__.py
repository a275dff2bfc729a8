"""Checkpoints: ours (native), the authors' (official_*), and the renaming between them (mapping)."""
