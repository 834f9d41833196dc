"""What to cite for a run, and the pages on the strategies."""

from __future__ import annotations

import re
import sys
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pytest
from paths import DOCS

from fedkd.data import DATASETS
from fedkd.experiment import Experiment
from fedkd.keys import kebab
from fedkd.knowledge import Rule
from fedkd.registry import ours
from fedkd.reports.citations import citations, entries
from fedkd.strategy import Facts
from fedkd.training.models import build

PAGES = DOCS / "strategies"
HEADINGS = [
    "What it does",
    "The algorithm",
    "Settings",
    "What crosses the wire",
    "When it helps, and when not",
    "Departures from the paper",
    "Numbers",
    "Source",
]
REQUIRED = {
    "article": {"title", "author", "journal", "year"},
    "inproceedings": {"title", "author", "booktitle", "year"},
    "techreport": {"title", "author", "institution", "year"},
    "misc": {"title", "author", "year"},
}
OURS = ours()
ENTRIES = entries()

every_entry = pytest.mark.parametrize("key", ENTRIES)
every_strategy = pytest.mark.parametrize("name", OURS)


def parse(entry: str) -> tuple[str, str, dict[str, str]]:
    """Read one BibTeX entry character by character: its type, its key, its fields."""
    kind, _, rest = entry.removeprefix("@").partition("{")
    key, _, rest = rest.partition(",")
    fields: dict[str, str] = {}
    while not rest.strip().startswith("}"):
        name, equals, rest = rest.partition("=")
        assert equals, f"{key}: no field in {rest!r}"
        rest = rest.strip()
        assert rest[0] == "{", f"{key}: the value of {name.strip()} is not in braces"
        end = closing_brace(rest)
        assert end, f"{key}: the braces of {name.strip()} do not close"
        assert rest[end + 1 : end + 2] == ",", f"{key}: no comma after {name.strip()}"
        assert name.strip() not in fields
        fields[name.strip()] = " ".join(rest[1:end].split())
        rest = rest[end + 2 :]
    assert rest.strip() == "}", f"{key}: something follows the entry"
    return kind, key, fields


def closing_brace(text: str) -> int:
    """Position of the brace that closes the one at the start; 0 if there is none."""
    depth = 0
    for position, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return position
    return 0


def surnames(author: str) -> list[str]:
    """Family names as they are printed, ``["McMahan", ..., "Agüera y Arcas"]``."""
    plain = author.replace(r"{\"u}", "ü").replace(r"{\'e}", "é").replace(r"{\~a}", "ã")
    return [person.partition(",")[0].strip("{}") for person in plain.split(" and ")]


def declared(paper: str, **facts: Any) -> Facts:
    """What a strategy of somebody else may declare."""
    return Facts(paper, "0", "0", **facts)


def cited(experiment: Experiment, facts: str | Facts) -> list[str]:
    """Keys of what is cited; comments as they are."""
    facts = declared(facts) if isinstance(facts, str) else facts
    found = citations(experiment, facts)
    return [text if text.startswith("%") else parse(text)[1] for text in found]


# --- The entries ----------------------------------------------------------------------------------


@every_entry
def test_an_entry_is_whole(key: str) -> None:
    kind, own_key, fields = parse(ENTRIES[key])
    assert own_key == key
    assert ENTRIES[key].isascii()
    # The year of a program is that of its release, and there is none yet.
    assert REQUIRED[kind] - fields.keys() == ({"year"} if key == "fedkd" else set())
    assert all(fields.values())


@every_entry
def test_the_year_is_plausible_and_the_key_says_author_and_year(key: str) -> None:
    if key == "fedkd":
        return
    _, _, fields = parse(ENTRIES[key])
    year = int(fields["year"])
    assert 1990 <= year <= date.today().year + 1
    first = surnames(fields["author"])[0]
    assert key.startswith(f"{first.lower()}{year}")
    if "eprint" in fields:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", fields["eprint"])
        assert fields["archiveprefix"] == "arXiv"
        preprint = 2000 + int(fields["eprint"][:2])
        published = "journal" in fields or "booktitle" in fields
        assert preprint <= year if published else preprint == year


def test_no_work_stands_there_twice() -> None:
    places = [citations, *OURS.values()]
    sources = [Path(str(sys.modules[place.__module__].__file__)) for place in places]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    assert len(re.findall(r"^ *@\w+\{", text, re.MULTILINE)) == len(ENTRIES)
    for field in ("title", "eprint", "doi"):
        values = [parse(entry)[2].get(field) for entry in ENTRIES.values()]
        given = [value for value in values if value is not None]
        assert len(set(given)) == len(given)


# --- What a run cites -----------------------------------------------------------------------------


@every_strategy
def test_the_paper_of_a_strategy_is_the_one_that_its_file_names(name: str) -> None:
    facts = OURS[name].facts
    paper = facts.paper
    keys = cited(Experiment(strategy=name), facts)
    assert [
        text for text in citations(Experiment(strategy=name), facts) if text == facts.bibtex
    ] == ([] if paper == "none" else [facts.bibtex])
    assert not [text for text in keys if text.startswith("%")]
    if paper == "none":
        assert keys == ["fedkd", "beutel2020flower", "lecun1998mnist", "raschka2018mlxtend"]
        return
    fields = parse(ENTRIES[keys[1]])[2]
    assert paper in (fields.get("eprint"), fields.get("doi"))
    file_says = sys.modules[OURS[name].__module__].__doc__ or ""
    assert [s for s in surnames(fields["author"]) if s not in file_says] == []
    assert ("hinton2015distilling" in keys) == facts.distils


def test_what_learns_from_no_outputs_is_not_distillation() -> None:
    """FedDF distils what the weights of its clients predict; means of features are no outputs."""
    plain = [name for name, cls in OURS.items() if not cls.facts.distils]
    assert plain == ["FedAvg", "FedProto", "FedProx", "LocalOnly"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_is_cited(dataset: str) -> None:
    without = cited(Experiment(), "1910.03581")
    keys = cited(Experiment(dataset=dataset), "1910.03581")
    assert not [text for text in keys if text.startswith("%")]
    assert (
        keys[:4]
        == without[:4]
        == ["fedkd", "li2019fedmd", "hinton2015distilling", "beutel2020flower"]
    )
    assert keys[4:]
    elsewhere = Experiment(dataset="digits", public=dataset, public_labels=False)
    assert set(keys[4:]) <= set(cited(elsewhere, "1910.03581"))


def test_the_order_is_fixed_and_nothing_is_cited_twice() -> None:
    experiment = Experiment(
        dataset="cifar10",
        public="cifar100",
        public_labels=False,
        strategy="CFD",
        strategy_config="up-bits=2 combine=trimmed-mean",
        codec="simplex:2+changed+range/simplex:1",
    )
    assert cited(experiment, "2012.00632") == [
        "fedkd",
        "sattler2022cfd",
        "yin2018median",
        "hinton2015distilling",
        "beutel2020flower",
        "krizhevsky2009cifar",
        "bamler2022constriction",
    ]


@pytest.mark.parametrize(
    ("codec", "keys"),
    [
        ("auto", []),
        ("float16+deflate", []),
        ("float32/simplex:4", ["sattler2022cfd"]),
        ("float16+changed", ["sattler2022cfd"]),
        ("simplex:1+range", ["sattler2022cfd", "bamler2022constriction"]),
    ],
)
def test_a_codec_is_cited(codec: str, keys: list[str]) -> None:
    plain = cited(Experiment(dataset="digits"), "2008.06180")
    coded = cited(Experiment(dataset="digits", codec=codec), "2008.06180")
    assert coded == plain + keys


@pytest.mark.parametrize("rule", get_args(Rule))
def test_a_robust_rule_is_cited(rule: str) -> None:
    plain = cited(Experiment(), "2008.06180")
    robust = cited(Experiment(strategy_config=f"combine={rule}"), "2008.06180")
    assert set(plain) <= set(robust)
    assert len(robust) - len(plain) == (rule != "mean")


@pytest.mark.parametrize("paper", ["none", "arXiv:2599.01234", "in preparation"])
def test_what_is_unknown_is_said_in_a_comment(paper: str) -> None:
    experiment = Experiment(dataset="my_data:squares", strategy="my_strategy.py:Vote")
    found = citations(experiment, declared(paper))
    strategy, data = (text for text in found if text.startswith("%"))
    assert "my_strategy.py:Vote" in strategy
    assert paper in strategy
    assert "my_data:squares" in data
    assert "\n" not in strategy + data
    assert "hinton2015distilling" in cited(experiment, paper)


def test_a_strategy_of_somebody_else_brings_its_entry() -> None:
    experiment = Experiment(strategy="my_strategy.py:Vote")
    entry = "@misc{me2026vote,\n  title = {Votes},\n}"
    indented = entry.replace("\n", "\n        ")
    facts = declared("2601.01234", bibtex=f"\n        {indented}\n        ")
    assert citations(experiment, facts)[1:3] == [entry, ENTRIES["hinton2015distilling"]]
    facts = declared("2601.01234", bibtex=entry, distils=False)
    assert citations(experiment, facts)[1:3] == [entry, ENTRIES["beutel2020flower"]]


@pytest.mark.parametrize("name", ["DSFL", "FedAvg"])
def test_a_strategy_of_somebody_else_is_cited_by_its_paper_as_ours_is(name: str) -> None:
    experiment, facts = Experiment(strategy="my_strategy.py:Vote"), OURS[name].facts
    assert cited(experiment, facts.paper) == cited(experiment, facts)


def test_the_version_that_ran_is_named() -> None:
    entry = citations(Experiment(), declared("none"), version="7.5.3")[0]
    kind, key, fields = parse(entry)
    assert (kind, key, fields["note"]) == ("misc", "fedkd", "Version 7.5.3")
    assert "note" not in parse(citations(Experiment(), declared("none"))[0])[2]


# --- The pages ------------------------------------------------------------------------------------


def page(name: str) -> str:
    return (PAGES / f"{name.lower()}.md").read_text(encoding="utf-8")


def sections(name: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)\n", page(name), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_there_is_a_page_for_each_strategy_and_no_other() -> None:
    pages = {path.stem for path in PAGES.glob("*.md")} - {"README"}
    assert pages == {name.lower() for name in OURS}


@every_strategy
def test_a_page_keeps_to_the_outline(name: str) -> None:
    found = sections(name)
    assert page(name).startswith("# ")
    assert list(found) == HEADINGS
    assert len(found["What it does"].strip().splitlines()) == 5
    assert re.search(r"^```text\n.+^```$", found["The algorithm"], re.MULTILINE | re.DOTALL)
    numbers = re.findall(r"^(\d+)\. ", found["Departures from the paper"], re.MULTILINE)
    assert numbers == [str(1 + i) for i in range(len(numbers))]
    own = re.findall(r"^\s+(\d+)\. ", OURS[name].__doc__ or "", re.MULTILINE)
    assert len(numbers) >= max(1, len(own)), "its file names more departures"
    before, _, rest = found["Numbers"].partition("<!-- numbers: begin -->\n")
    assert "<!-- numbers: end -->\n" in rest
    assert page(name).count("<!-- numbers: ") == 2
    assert before != found["Numbers"]
    paper = OURS[name].facts.paper
    assert paper == "none" or f"https://arxiv.org/abs/{paper}" in found["Source"]


@every_strategy
def test_a_page_names_the_settings_with_their_defaults(name: str) -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| `([^`]+)` \| ", sections(name)["Settings"], re.MULTILINE)
    defaults = OURS[name]().settings()
    texts = {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in defaults.items()}
    assert dict(rows) == {kebab(k): text for k, text in texts.items()}
    assert len(rows) == len(defaults)


@every_strategy
def test_a_page_gives_the_declared_bytes_and_works_them_out(name: str) -> None:
    facts, text = OURS[name].facts, sections(name)["What crosses the wire"]
    said = f"A client sends `{facts.up}` bytes a round and receives `{facts.down}`"
    assert said in " ".join(text.split())
    model = build("mlp-20", (1, 28, 28), 10)
    numbers = {
        "P": 1_000,
        "C": 10,
        "I": 0,
        "D": 20,
        "S": sum(t.nbytes for t in model.state_dict().values()),
        **OURS[name]().settings(),
    }
    for formula in (facts.up, facts.down):
        worked_out = int(eval(formula.removeprefix("<= "), {"__builtins__": {}}, numbers))
        assert re.search(rf"(?<![\d,]){worked_out:,}(?![\d,])", text), (formula, worked_out)


@every_strategy
def test_every_link_of_a_page_leads_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page(name)):
        assert target.startswith("https://") or (PAGES / target).exists(), target
