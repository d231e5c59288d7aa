"""Evaluation as the field measures it: features, distances, figures of clips, privacy, tables."""
