"""Phases: they survive the wire, name only code that is allowed, and are cut for the closing."""

from __future__ import annotations

import json

import federation_tools
import pytest

from fedkd import losses
from fedkd.errors import FedkdError
from fedkd.losses import Term, ce, kl, kl_mean, mae_logits
from fedkd.phases import (
    Digest,
    Fit,
    Load,
    Phase,
    Predict,
    Revisit,
    SendWeights,
    closing,
    from_text,
    import_path,
    resolve_term,
    to_text,
)
from fedkd.registry import strategies

EVERY: list[Phase] = [
    Load(),
    Fit("transfer", "teacher", public={"ce": 1.0}, epochs=3),
    Digest(),
    Digest(mae_logits, epochs=2),
    Fit(
        "joint",
        private={"ce": "1-alpha", "module:function": -0.25},
        public={"kl": "alpha"},
        numbers={"width": 0.1, "count": 7},
    ),
    Revisit({ce: 0.5, federation_tools.refuses_nines: 1e-9}, "student", 5, {"mu": 1e-3}),
    Predict(),
    Predict("probabilities", "student", "answer"),
    SendWeights(),
    SendWeights("weights"),
]


def test_every_phase_survives_the_wire() -> None:
    assert from_text(to_text(EVERY)) == tuple(EVERY)
    assert from_text(to_text([])) == ()
    assert isinstance(json.loads(to_text(EVERY)), list)


@pytest.mark.parametrize("name", strategies())
def test_every_strategys_phases_survive_the_wire(name: str) -> None:
    for number in (1, 2, 3):
        phases = strategies()[name]().phases(number)
        assert phases
        assert from_text(to_text(phases)) == tuple(phases)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "nonsense",
        "null",
        "3",
        '"Load"',
        "[3]",
        '["Load"]',
        "[null]",
        "[[]]",
        "{}",
        '{"phase": "Load"}',
        '[{"name": "load"}]',
        '[{"phase": "Explode"}]',
        '[{"phase": "__class__"}]',
        '[{"phase": ["Load"]}]',
        '[{"phase": "Fit"}]',
        '[{"phase": "Load", "os": "system"}]',
    ],
)
def test_what_is_not_a_list_of_phases_is_refused(text: str) -> None:
    with pytest.raises(FedkdError, match="phases"):
        from_text(text)


def test_digest_mixes_the_soft_term_with_cross_entropy_by_alpha() -> None:
    assert Digest() == Fit("digest", "student", public={"kl": "alpha", "ce": "1-alpha"})
    assert Digest("mae_logits").public == {"mae_logits": "alpha", "ce": "1-alpha"}
    assert Digest(epochs=4).epochs == 4
    assert not Digest().private


def test_revisit_is_cross_entropy_on_the_private_shard_unless_told_otherwise() -> None:
    assert Revisit() == Fit("revisit", "teacher", private={"ce": 1.0})
    other = Revisit({kl: "alpha"}, model="student", numbers={"mu": 0.1})
    assert other == Fit("revisit", "student", private={"kl": "alpha"}, numbers={"mu": 0.1})


def test_terms_travel_under_a_name_that_leads_back_to_them() -> None:
    assert import_path(kl) == "kl"
    assert import_path("kl") == "kl"
    assert import_path(federation_tools.refuses_nines) == "federation_tools:refuses_nines"
    assert import_path("fedkd.losses:mae_logits") == "mae_logits"


@pytest.mark.parametrize("term", [ce, kl, kl_mean, mae_logits])
def test_our_own_terms_are_found_by_either_name(term: Term) -> None:
    assert resolve_term(import_path(term)) is term
    assert resolve_term(term.import_path) is term


def test_all_terms_of_fedkd_can_be_resolved() -> None:
    terms = {name: value for name, value in vars(losses).items() if isinstance(value, Term)}
    assert len(terms) >= 4
    for name, term in terms.items():
        assert resolve_term(name) is term


def test_a_users_term_is_found_in_the_modules_that_the_client_allows_only() -> None:
    name = "federation_tools:refuses_nines"
    assert resolve_term(name, ["federation_tools"]) is federation_tools.refuses_nines
    for allowed in ([], ["federation"], ["federation_tools.other"]):
        with pytest.raises(FedkdError, match=r"federation_tools:refuses_nines.*client-code"):
            resolve_term(name, allowed)


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:exec",
        "fedkd:run",
        "fedkd.engines.run:run",
        "fedkd.data:load",
        "fedkd.lossesque:kl",
        "strategiesque:kl",
        "subprocess:run",
        ".os:system",
    ],
)
def test_a_server_cannot_name_other_code(name: str) -> None:
    with pytest.raises(FedkdError, match=r"only runs code of fedkd\.losses, strategies, mine"):
        resolve_term(name, ["mine"])


@pytest.mark.parametrize(
    "name",
    [
        "soft_term",
        "Term",
        "torch",
        "nothing",
        "",
        "fedkd.losses:",
        "strategies:DSFL",
        "federation_tools:not_a_term",
        "federation_tools:Clients.handle",
        "fedkd.losses.os:system",
        "strategies.nothing:term",
        "strategies:dsfl.term",
    ],
)
def test_what_is_no_term_is_refused_by_name(name: str) -> None:
    with pytest.raises(FedkdError, match=r"term|no such|not found|there is no"):
        resolve_term(name, ["federation_tools"])


@pytest.mark.parametrize(
    ("phases", "digest", "revisit"),
    [
        ([Digest(), Revisit(), Predict()], [Digest()], [Digest(), Revisit()]),
        ([Load(), Revisit(), SendWeights()], [Load()], [Load(), Revisit()]),
        ([Revisit(), Predict()], [], [Revisit()]),
        ([Predict()], [], []),
        ([], [], []),
        ([Predict(), Digest(), SendWeights(), Revisit()], [], []),
        (
            [Load(), Digest(), Fit("both", private={"ce": 1}, public={"kl": 1}), Revisit()],
            [Load(), Digest(), Fit("both", private={"ce": 1}, public={"kl": 1})],
            [Load(), Digest(), Fit("both", private={"ce": 1}, public={"kl": 1}), Revisit()],
        ),
    ],
)
def test_the_closing_exchange_ends_where_the_algorithm_does(
    phases: list[Phase], digest: list[Phase], revisit: list[Phase]
) -> None:
    before = list(phases)
    assert closing(phases, "digest") == digest
    assert closing(phases, "revisit") == revisit
    assert phases == before
