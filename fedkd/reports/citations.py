r"""BibTeX entries for everything that a run used.

A strategy's entry is in its own file, with its facts; all others are here. They were checked against the
publishers' or arXiv's pages, or the full text; what could not be confirmed is left out. Accents are
LaTeX's, so that every BibTeX can read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from fedkd.experiment import Experiment
from fedkd.federation.algorithm import Facts
from fedkd.registry import ours

_BIBTEX = r"""
@misc{fedkd,
  title = {fedkd: Federated distillation on {Flower}},
  author = {{The fedkd contributors}},
}

@misc{hinton2015distilling,
  title = {Distilling the Knowledge in a Neural Network},
  author = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  year = {2015},
  eprint = {1503.02531},
  archiveprefix = {arXiv},
}

@misc{beutel2020flower,
  title = {Flower: A Friendly Federated Learning Research Framework},
  author = {Beutel, Daniel J. and Topal, Taner and Mathur, Akhil and Qiu, Xinchi and
    Fernandez-Marques, Javier and Gao, Yan and Sani, Lorenzo and Li, Kwing Hei and
    Parcollet, Titouan and de Gusm{\~a}o, Pedro Porto Buarque and Lane, Nicholas D.},
  year = {2020},
  eprint = {2007.14390},
  archiveprefix = {arXiv},
}

@inproceedings{yin2018median,
  title = {{Byzantine}-Robust Distributed Learning: Towards Optimal Statistical Rates},
  author = {Yin, Dong and Chen, Yudong and Ramchandran, Kannan and Bartlett, Peter},
  booktitle = {Proceedings of the 35th International Conference on Machine Learning},
  series = {Proceedings of Machine Learning Research},
  volume = {80},
  pages = {5650--5659},
  year = {2018},
  eprint = {1803.01498},
  archiveprefix = {arXiv},
}

@article{vardi2000median,
  title = {The multivariate {$L_1$}-median and associated data depth},
  author = {Vardi, Yehuda and Zhang, Cun-Hui},
  journal = {Proceedings of the National Academy of Sciences},
  volume = {97},
  number = {4},
  pages = {1423--1426},
  year = {2000},
}

@article{lecun1998mnist,
  title = {Gradient-Based Learning Applied to Document Recognition},
  author = {LeCun, Yann and Bottou, L{\'e}on and Bengio, Yoshua and Haffner, Patrick},
  journal = {Proceedings of the IEEE},
  volume = {86},
  number = {11},
  pages = {2278--2324},
  year = {1998},
  doi = {10.1109/5.726791},
}

@article{raschka2018mlxtend,
  title = {{MLxtend}: Providing machine learning and data science utilities and extensions to
    {Python's} scientific computing stack},
  author = {Raschka, Sebastian},
  journal = {The Journal of Open Source Software},
  volume = {3},
  number = {24},
  pages = {638},
  year = {2018},
  doi = {10.21105/joss.00638},
}

@misc{xiao2017fashion,
  title = {{Fashion-MNIST}: a Novel Image Dataset for Benchmarking Machine Learning Algorithms},
  author = {Xiao, Han and Rasul, Kashif and Vollgraf, Roland},
  year = {2017},
  eprint = {1708.07747},
  archiveprefix = {arXiv},
}

@techreport{krizhevsky2009cifar,
  title = {Learning Multiple Layers of Features from Tiny Images},
  author = {Krizhevsky, Alex},
  institution = {University of Toronto},
  year = {2009},
}

@misc{alpaydin1998digits,
  title = {Optical Recognition of Handwritten Digits},
  author = {Alpaydin, E. and Kaynak, C.},
  howpublished = {UCI Machine Learning Repository},
  year = {1998},
  doi = {10.24432/C50P49},
}

@article{pedregosa2011sklearn,
  title = {Scikit-learn: Machine Learning in {Python}},
  author = {Pedregosa, F. and Varoquaux, G. and Gramfort, A. and Michel, V. and Thirion, B. and
    Grisel, O. and Blondel, M. and Prettenhofer, P. and Weiss, R. and Dubourg, V. and
    Vanderplas, J. and Passos, A. and Cournapeau, D. and Brucher, M. and Perrot, M. and
    Duchesnay, E.},
  journal = {Journal of Machine Learning Research},
  volume = {12},
  pages = {2825--2830},
  year = {2011},
}

@misc{bamler2022constriction,
  title = {Understanding Entropy Coding With Asymmetric Numeral Systems ({ANS}): a Statistician's
    Perspective},
  author = {Bamler, Robert},
  year = {2022},
  eprint = {2201.01741},
  archiveprefix = {arXiv},
}
"""


@cache
def entries() -> Mapping[str, str]:
    """Return all entries by their key: those above, and those of the built-in strategies."""
    declared = [facts.bibtex for facts in _ours() if facts.bibtex]
    return {
        re.match(r"@\w+\{(.+),", entry)[1]: entry  # type: ignore[index]
        for entry in (*_BIBTEX.strip().split("\n\n"), *declared)
    }


@cache
def _by_paper() -> Mapping[str, str]:
    """Return the entries by arXiv number and by DOI."""
    return {
        number: entry
        for entry in entries().values()
        for number in re.findall(r"^  (?:eprint|doi) = \{(.+)\}", entry, re.MULTILINE)
    }


def _ours() -> list[Facts]:
    return [cls.facts for cls in ours().values()]


_DATASETS: Mapping[str, tuple[str, ...]] = {
    "digits": ("alpaydin1998digits", "pedregosa2011sklearn"),
    "mnist-5k": ("lecun1998mnist", "raschka2018mlxtend"),
    "mnist": ("lecun1998mnist",),
    "fashion-mnist": ("xiao2017fashion",),
    "cifar10": ("krizhevsky2009cifar",),
    "cifar100": ("krizhevsky2009cifar",),
}
"""What to cite for a data set: its source, then the package that ships it."""

_CODECS: Mapping[str, str] = {
    "simplex": "sattler2022cfd",  # the constrained quantiser
    "changed": "sattler2022cfd",  # delta coding
    "range": "bamler2022constriction",
}
"""What to cite for a word in a codec."""

_RULES: Mapping[str, str] = {
    "combine=median": "yin2018median",
    "combine=trimmed-mean": "yin2018median",
    "combine=geometric-median": "vardi2000median",
}
"""What to cite for a strategy's robust rule."""


def citations(experiment: Experiment, facts: Facts, version: str | None = None) -> list[str]:
    """Return what to cite for a run of `experiment`, each once.

    In this order: fedkd, the strategy, its robust rule, knowledge distillation where soft labels are
    used for training, Flower, the data set, a public set from elsewhere, the codec.

    Args:
        experiment: what was run.
        facts: what its strategy declares. If they have no BibTeX, the entry here with the same
            `paper` is used, if any.
        version: fedkd's when it ran.

    Returns:
        BibTeX entries, and BibTeX comments (a line that begins with %) for what has no entry here: the
        paper of a third party's strategy, a data set by ``module:function``.
    """
    used = [_of_fedkd(version), *_of_strategy(experiment, facts), entries()["beutel2020flower"]]
    used += _of_data(experiment.dataset)
    if experiment.public != "train":
        used += _of_data(experiment.public)
    used += _of_words(_CODECS, experiment.codec)
    return list(dict.fromkeys(used))


def _of_fedkd(version: str | None) -> str:
    entry = entries()["fedkd"]
    return entry if version is None else f"{entry[:-1]}  note = {{Version {version}}},\n}}"


def _of_strategy(experiment: Experiment, facts: Facts) -> list[str]:
    entry = facts.bibtex or _by_paper().get(facts.paper)
    distils = facts.distils and entry not in [each.bibtex for each in _ours() if not each.distils]
    if entry is None and facts.paper == "none" and not distils:  # only local training
        return []
    comment = (
        f"% strategy {experiment.strategy}: fedkd has no entry for what it declares, "
        f"paper = {facts.paper!r}"
    )
    used = [entry or comment, *_of_words(_RULES, experiment.strategy_config)]
    return [*used, entries()["hinton2015distilling"]] if distils else used


def _of_data(name: str) -> list[str]:
    if name in _DATASETS:
        return [entries()[key] for key in _DATASETS[name]]
    return [f"% data set {name}: fedkd has no entry for it"]


def _of_words(keys: Mapping[str, str], text: str) -> list[str]:
    """Return the entries for the words in `text`, in the order of the table."""
    words = re.split(r"[^\w=-]+", text)
    return [entries()[key] for word, key in keys.items() if word in words]
