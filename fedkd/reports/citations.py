r"""What to cite: the BibTeX of what a run was made of.

Entries were compared with the publishers' or arXiv's own pages, or with the full text; what could not
be confirmed is left out, never guessed. Accents are LaTeX's, so that every BibTeX can read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fedkd.experiment import Experiment

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

@misc{li2019fedmd,
  title = {{FedMD}: Heterogenous Federated Learning via Model Distillation},
  author = {Li, Daliang and Wang, Junpu},
  year = {2019},
  eprint = {1910.03581},
  archiveprefix = {arXiv},
}

@article{itahara2023dsfl,
  title = {Distillation-Based Semi-Supervised Federated Learning for Communication-Efficient
    Collaborative Training With Non-{IID} Private Data},
  author = {Itahara, Sohei and Nishio, Takayuki and Koda, Yusuke and Morikura, Masahiro and
    Yamamoto, Koji},
  journal = {IEEE Transactions on Mobile Computing},
  volume = {22},
  number = {1},
  pages = {191--205},
  year = {2023},
  doi = {10.1109/TMC.2021.3070013},
  eprint = {2008.06180},
  archiveprefix = {arXiv},
}

@article{azuma2026scarlet,
  title = {Soft-Label Caching and Sharpening for Communication-Efficient Federated Distillation},
  author = {Azuma, Kitsuya and Nishio, Takayuki and Kitagawa, Yuichi and Nakano, Wakako and
    Tanimura, Takahito},
  journal = {IEEE Transactions on Mobile Computing},
  year = {2026},
  doi = {10.1109/TMC.2026.3652819},
  eprint = {2504.19602},
  archiveprefix = {arXiv},
}

@article{sattler2022cfd,
  title = {{CFD}: Communication-Efficient Federated Distillation via Soft-Label Quantization and
    Delta Coding},
  author = {Sattler, Felix and Marban, Arturo and Rischke, Roman and Samek, Wojciech},
  journal = {IEEE Transactions on Network Science and Engineering},
  volume = {9},
  number = {4},
  pages = {2025--2038},
  year = {2022},
  doi = {10.1109/TNSE.2021.3081748},
  eprint = {2012.00632},
  archiveprefix = {arXiv},
}

@misc{chang2019cronus,
  title = {Cronus: Robust and Heterogeneous Collaborative Learning with Black-Box Knowledge
    Transfer},
  author = {Chang, Hongyan and Shejwalkar, Virat and Shokri, Reza and Houmansadr, Amir},
  year = {2019},
  eprint = {1912.11279},
  archiveprefix = {arXiv},
}

@inproceedings{roux2025expguard,
  title = {On the {Byzantine}-Resilience of Distillation-Based Federated Learning},
  author = {Roux, Christophe and Zimmer, Max and Pokutta, Sebastian},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  eprint = {2402.12265},
  archiveprefix = {arXiv},
}

@misc{cho2021comet,
  title = {Personalized Federated Learning for Heterogeneous Clients with Clustered Knowledge
    Transfer},
  author = {Cho, Yae Jee and Wang, Jianyu and Chiruvolu, Tarun and Joshi, Gauri},
  year = {2021},
  eprint = {2109.08119},
  archiveprefix = {arXiv},
  note = {Named COMET in the journal version, doi 10.1109/JSTSP.2022.3231527},
}

@article{shao2024selective,
  title = {Selective knowledge sharing for privacy-preserving federated distillation without a good
    teacher},
  author = {Shao, Jiawei and Wu, Fangzhao and Zhang, Jun},
  journal = {Nature Communications},
  volume = {15},
  year = {2024},
  doi = {10.1038/s41467-023-44383-9},
  eprint = {2304.01731},
  archiveprefix = {arXiv},
}

@inproceedings{zhang2021ktpfl,
  title = {Parameterized Knowledge Transfer for Personalized Federated Learning},
  author = {Zhang, Jie and Guo, Song and Ma, Xiaosong and Wang, Haozhao and Xu, Wenchao and
    Wu, Feijie},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {34},
  pages = {10092--10104},
  year = {2021},
  eprint = {2111.02862},
  archiveprefix = {arXiv},
}

@misc{cheng2021fedgems,
  title = {{FedGEMS}: Federated Learning of Larger Server Models via Selective Knowledge Fusion},
  author = {Cheng, Sijie and Wu, Jingwen and Xiao, Yanghua and Liu, Yang and Liu, Yang},
  year = {2021},
  eprint = {2110.11027},
  archiveprefix = {arXiv},
}

@misc{jeong2018fd,
  title = {Communication-Efficient On-Device Machine Learning: Federated Distillation and
    Augmentation under Non-{IID} Private Data},
  author = {Jeong, Eunjeong and Oh, Seungeun and Kim, Hyesung and Park, Jihong and Bennis, Mehdi and
    Kim, Seong-Lyun},
  year = {2018},
  eprint = {1811.11479},
  archiveprefix = {arXiv},
}

@inproceedings{tan2022fedproto,
  title = {{FedProto}: Federated Prototype Learning across Heterogeneous Clients},
  author = {Tan, Yue and Long, Guodong and Liu, Lu and Zhou, Tianyi and Lu, Qinghua and Jiang, Jing and
    Zhang, Chengqi},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  volume = {36},
  number = {8},
  pages = {8432--8440},
  year = {2022},
  doi = {10.1609/aaai.v36i8.20819},
  eprint = {2105.00243},
  archiveprefix = {arXiv},
}

@inproceedings{mcmahan2017fedavg,
  title = {Communication-Efficient Learning of Deep Networks from Decentralized Data},
  author = {McMahan, Brendan and Moore, Eider and Ramage, Daniel and Hampson, Seth and
    Ag{\"u}era y Arcas, Blaise},
  booktitle = {Proceedings of the 20th International Conference on Artificial Intelligence and
    Statistics},
  series = {Proceedings of Machine Learning Research},
  volume = {54},
  pages = {1273--1282},
  year = {2017},
  eprint = {1602.05629},
  archiveprefix = {arXiv},
}

@inproceedings{li2020fedprox,
  title = {Federated Optimization in Heterogeneous Networks},
  author = {Li, Tian and Sahu, Anit Kumar and Zaheer, Manzil and Sanjabi, Maziar and
    Talwalkar, Ameet and Smith, Virginia},
  booktitle = {Proceedings of Machine Learning and Systems},
  volume = {2},
  pages = {429--450},
  year = {2020},
  eprint = {1812.06127},
  archiveprefix = {arXiv},
}

@inproceedings{lin2020feddf,
  title = {Ensemble Distillation for Robust Model Fusion in Federated Learning},
  author = {Lin, Tao and Kong, Lingjing and Stich, Sebastian U. and Jaggi, Martin},
  booktitle = {Advances in Neural Information Processing Systems},
  volume = {33},
  pages = {2351--2363},
  year = {2020},
  eprint = {2006.07242},
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

ENTRIES: Mapping[str, str] = {
    re.match(r"@\w+\{(.+),", entry)[1]: entry  # type: ignore[index]
    for entry in _BIBTEX.strip().split("\n\n")
}
"""All entries by their key."""

_PAPERS = {
    number: key
    for key, entry in ENTRIES.items()
    for number in re.findall(r"^  (?:eprint|doi) = \{(.+)\}", entry, re.MULTILINE)
}
"""Keys by arXiv number and by DOI."""

_DATASETS: Mapping[str, tuple[str, ...]] = {
    "digits": ("alpaydin1998digits", "pedregosa2011sklearn"),
    "mnist-5k": ("lecun1998mnist", "raschka2018mlxtend"),
    "mnist": ("lecun1998mnist",),
    "fashion-mnist": ("xiao2017fashion",),
    "cifar10": ("krizhevsky2009cifar",),
    "cifar100": ("krizhevsky2009cifar",),
}
"""What to cite for a data set: who made it, then the package that ships it."""

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

_WITHOUT_SOFT_LABELS = ("mcmahan2017fedavg", "li2020fedprox", "tan2022fedproto")
_ALONE = "localonly"
"""The strategy that nobody published, and that distils nothing."""


def citations(experiment: Experiment, paper: str, version: str | None = None) -> list[str]:
    """Return what to cite for a run of `experiment`, each once.

    In this order: fedkd, the strategy, its robust rule, knowledge distillation where soft labels are
    learnt from, Flower, the data set, a public set from elsewhere, the codec.

    Args:
        experiment: what was run.
        paper: what its strategy declares (``facts.paper``): an arXiv number, a DOI, or ``"none"``.
        version: of fedkd when it ran.

    Returns:
        BibTeX entries, and BibTeX comments (a line that begins with %) for what has no entry here: the
        paper of somebody else's strategy, a data set by ``module:function``.
    """
    found = [_of_fedkd(version), *_of_strategy(experiment, paper), ENTRIES["beutel2020flower"]]
    found += _of_data(experiment.dataset)
    if experiment.public != "train":
        found += _of_data(experiment.public)
    found += _of_words(_CODECS, experiment.codec)
    return list(dict.fromkeys(found))


def _of_fedkd(version: str | None) -> str:
    entry = ENTRIES["fedkd"]
    return entry if version is None else f"{entry[:-1]}  note = {{Version {version}}},\n}}"


def _of_strategy(experiment: Experiment, paper: str) -> list[str]:
    name = experiment.strategy
    if paper == "none" and name.lower().replace("-", "").replace("_", "") == _ALONE:
        return []
    key = _PAPERS.get(paper)
    comment = f"% strategy {name}: fedkd has no entry for what it declares, paper = {paper!r}"
    found = [comment if key is None else ENTRIES[key]]
    found += _of_words(_RULES, experiment.strategy_config)
    return found if key in _WITHOUT_SOFT_LABELS else [*found, ENTRIES["hinton2015distilling"]]


def _of_data(name: str) -> list[str]:
    if name in _DATASETS:
        return [ENTRIES[key] for key in _DATASETS[name]]
    return [f"% data set {name}: fedkd has no entry for it"]


def _of_words(keys: Mapping[str, str], text: str) -> list[str]:
    """Return the entries for the words in `text`, in the order of the table."""
    words = re.split(r"[^\w=-]+", text)
    return [ENTRIES[key] for word, key in keys.items() if word in words]
