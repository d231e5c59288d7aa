"""Readers of the data sets of the field, all as `Record`s: docs/data.md."""

from heartbeat_training.datasets.base import Dataset, DatasetError, LeakError
from heartbeat_training.datasets.camus import CamusDataset

__all__ = ["CamusDataset", "Dataset", "DatasetError", "LeakError"]
