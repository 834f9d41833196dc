"""The algorithms, one a file."""

from strategies.cfd import CFD
from strategies.comet import COMET
from strategies.cronus import Cronus
from strategies.dsfl import DSFL
from strategies.expguard import ExpGuard
from strategies.fd import FD
from strategies.fedavg import FedAvg
from strategies.feddf import FedDF
from strategies.fedgems import FedGEMS
from strategies.fedmd import FedMD
from strategies.fedproto import FedProto
from strategies.fedprox import FedProx
from strategies.ktpfl import KTpFL
from strategies.localonly import LocalOnly
from strategies.scarlet import SCARLET
from strategies.selectivefd import SelectiveFD

__all__ = [
    "CFD",
    "COMET",
    "DSFL",
    "FD",
    "SCARLET",
    "Cronus",
    "ExpGuard",
    "FedAvg",
    "FedDF",
    "FedGEMS",
    "FedMD",
    "FedProto",
    "FedProx",
    "KTpFL",
    "LocalOnly",
    "SelectiveFD",
]
