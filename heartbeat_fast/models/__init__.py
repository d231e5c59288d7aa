"""The torch definitions: imported by export, training and the torch engine only."""
