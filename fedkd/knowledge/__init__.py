"""Knowledge: what crosses the wire between clients and server.

Three kinds. `SoftLabels` hold what K clients think of N public samples; `ClassMeans` what each makes
of a class on average, without a public set; `Weights` hold model parameters (for FedAvg, the usual
baseline). A leading axis K everywhere: K repliers on the way up, K recipients on the way down, or 1 for
knowledge that all share. A `Wire` says how soft labels are encoded, a `Rule` how the answers of clients
become one.
"""

from fedkd.knowledge.arrival import Sizes
from fedkd.knowledge.class_means import LARGEST_MEAN, ClassMeans, Output
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
    "LARGEST_MEAN",
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
