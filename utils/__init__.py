"""Settings, training, checkpoints, figures and drawings: what the scripts share."""
