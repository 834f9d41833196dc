"""Knowledge: what clients and server exchange.

There are three kinds. `SoftLabels` are the predictions of K clients for N public samples; `ClassMeans`
are each client's mean outputs by class, without a public set; `Weights` are model parameters (for FedAvg,
the usual baseline). All have a leading axis K: K clients that reply on the way up, K that receive on the
way down, or 1 for knowledge that all share. A `Wire` says how soft labels are encoded, a `Rule` how the
answers of clients are combined.
"""

from fedkd.knowledge.arrival import Sizes
from fedkd.knowledge.class_means import ClassMeans, Output
from fedkd.knowledge.kinds import (
    KINDS,
    Knowledge,
    check_answer,
    require_one,
    tensors_of,
)
from fedkd.knowledge.robust import (
    Rule,
    combine,
    combine_logits,
    combine_probabilities,
    in_canonical_order,
)
from fedkd.knowledge.soft_labels import SIMPLEX_TOLERANCE, SoftLabels, Space
from fedkd.knowledge.weights import ModelWeights, Weights
from fedkd.knowledge.wire import Wire

__all__ = [
    "KINDS",
    "SIMPLEX_TOLERANCE",
    "ClassMeans",
    "Knowledge",
    "ModelWeights",
    "Output",
    "Rule",
    "Sizes",
    "SoftLabels",
    "Space",
    "Weights",
    "Wire",
    "check_answer",
    "combine",
    "combine_logits",
    "combine_probabilities",
    "in_canonical_order",
    "require_one",
    "tensors_of",
]
