"""What the studies of experiments/ share: their points and tables, plots, trainings in memory (grn[studies])."""
