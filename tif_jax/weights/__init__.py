"""Weights of a model from anywhere: other programs' files, our checkpoints, workdirs."""
