"""Data sets, their split into a public set and private shards, and images on the device."""

from fedkd.data.cache import data_folder, fingerprint, load, read_tensors, write_tensors
from fedkd.data.datasets import DATASETS, TENSORS, Dataset, DatasetInfo

__all__ = [
    "DATASETS",
    "TENSORS",
    "Dataset",
    "DatasetInfo",
    "data_folder",
    "fingerprint",
    "load",
    "read_tensors",
    "write_tensors",
]
