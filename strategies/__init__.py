"""The algorithms, one a file."""

from strategies.dsfl import DSFL
from strategies.fedavg import FedAvg
from strategies.fedmd import FedMD
from strategies.localonly import LocalOnly

__all__ = ["DSFL", "FedAvg", "FedMD", "LocalOnly"]
