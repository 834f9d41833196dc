"""A real browser shows every figure of a report, on a phone and on a screen, in light and in dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedkd
from fedkd.reports.report import report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

CLIPPED = """
() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1
      || own.bottom > box.bottom + 1;
  }).map(text => `${svg.parentElement.id}: ${text.textContent}`);
})
"""
"""Labels that stick out of their figure."""

SMALLEST = """
() => Math.min(...[...document.querySelectorAll('figure svg text')].map(text => {
  const svg = text.ownerSVGElement;
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  return parseFloat(getComputedStyle(text).fontSize) * scale;
}))
"""
"""Pixels of the smallest label."""

OVERLAPS = """
() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('text')].map(t => [t, t.getBoundingClientRect()]);
  const found = [];
  boxes.forEach(([a, x], i) => boxes.slice(i + 1).forEach(([b, y]) => {
    const wide = Math.min(x.right, y.right) - Math.max(x.left, y.left);
    const high = Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top);
    if (wide > 1 && high > 0.35 * Math.min(x.height, y.height))
      found.push(`${svg.parentElement.id}: ${a.textContent} / ${b.textContent}`);
  }));
  return found;
})
"""
"""Labels that lie on each other (line boxes may touch)."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module", params=[3, 100], ids=lambda clients: f"{clients} clients")
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of a comparison of so many clients."""
    folder = tmp_path_factory.mktemp("runs")
    experiment = fedkd.Experiment(
        dataset="digits",
        public_size=97,
        public_labels=False,
        num_clients=request.param,
        min_partition_size=1,
        student="mlp-8",
        teacher="mlp-13",
        num_server_rounds=2,
        device="cpu",
        run_dir=str(folder),
    )
    few = request.param == 3
    methods = ["teacher", "student-distilled", "LocalOnly", "FedAvg", "DSFL", "FedMD"]
    compared = fedkd.compare(
        experiment, methods if few else ["LocalOnly", "DSFL"], [0, 1] if few else [0]
    )
    return report([compared.path], folder / "report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_it_looks_right(browser: Any, page: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    shown = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(page.as_uri())
    listed = [a.get_attribute("href") for a in shown.query_selector_all("nav li a")]
    assert len(listed) >= 8
    for target in listed:
        figure = shown.query_selector(f"figure[id='{target[1:]}']")
        box = figure.query_selector("svg").bounding_box()
        assert figure.query_selector("svg").is_visible()
        assert box["width"] > 340
        assert box["height"] > 90
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate(CLIPPED) == []
    assert shown.evaluate(OVERLAPS) == []
    assert shown.evaluate(SMALLEST) >= 8.5
    assert said == []
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    dark = shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")
    context.close()


def test_figures_stand_in_two_columns_on_a_wide_screen_and_in_one_on_a_phone(
    browser: Any, page: Path
) -> None:
    for width, columns in ((400, 1), (1400, 2)):
        shown = browser.new_page(viewport={"width": width, "height": 900})
        shown.goto(page.as_uri())
        places = {f.bounding_box()["x"] for f in shown.query_selector_all("figure")}
        assert len(places) == columns
        shown.close()
