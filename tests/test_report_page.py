"""report.html: self-contained, safe with any string, complete without JavaScript; its curves and maps lose no peak and no NaN."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
import report_samples as samples

from sickbay import registry
from sickbay.core.chart import Chart, Reading
from sickbay.core.diagnosis import Checkup, Diagnosis, Evidence, Threshold
from sickbay.report import curves, heatmap
from sickbay.report.page import page
from sickbay.report.prose import blocks, inline

VOID = {"meta", "br", "link", "img", "input", "hr"}


@pytest.fixture(autouse=True)
def small_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "conditions", samples.known_conditions)
    monkeypatch.setattr(registry, "treatments", samples.known_treatments)


class Document(HTMLParser):
    """The page's tags, their attributes, the text of each element kind; raises on wrong nesting."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.visible = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data
            if self.open[-1] not in ("script", "style"):
                self.visible += data


@pytest.fixture(scope="module")
def sick() -> Document:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "conditions", samples.known_conditions)
        patch.setattr(registry, "treatments", samples.known_treatments)
        return Document(page(samples.sick_chart(), samples.sick_checkup()))


def sha(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_the_policy_allows_nothing_but_this_style_and_this_script(sick: Document):
    policy = next(attrs["content"] for tag, attrs in sick.tags if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy")
    script, style = sick.texts["script"][-1], sick.texts["style"][0]
    assert policy == f"default-src 'none'; style-src '{sha(style)}'; script-src '{sha(script)}'; base-uri 'none'; form-action 'none'"
    assert not [attrs for _, attrs in sick.tags if "style" in attrs]  # the policy would drop them


def test_the_page_loads_nothing(sick: Document):
    assert not [(tag, attrs) for tag, attrs in sick.tags if attrs.keys() & {"src", "srcset", "data", "action"} or tag in ("link", "iframe")]
    style = sick.texts["style"][0]
    assert "url(" not in style
    assert "@import" not in style


def test_the_findings_are_read_without_javascript(sick: Document):
    text = re.sub(r"\s+", " ", sick.visible)
    for said in (
        "SICK: 1 critical, 1 warning",
        "train.py --lr 3e-3",
        "failed (exit code 1)",
        "exploding-gradients",
        "rose from a median of 1.2 to 18,400",
        "transformer.h.3.attn.c_proj.weight",
        "train.py:88",
        "clip-gradients",
        "non-finite-weights",
        "Each layer multiplies.",
        "data-repeats",
        "no padding was seen",
        "1.8% of step time",
    ):
        assert said in text, said


def test_the_marks_and_numbers_are_in_the_data(sick: Document):
    data = json.loads(sick.texts["script"][0])
    assert data["marks"] == [[400, "1 exploding-gradients", "critical"], [1, "2 causal-leak", "warning"]]
    assert [chart["id"] for chart in data["charts"]] == ["loss", "grad_norm", "update_ratio", "learning_rate"]
    assert data["charts"][0]["lost"] == [412]
    assert data["charts"][0]["lines"][0]["values"][-1] is None
    assert [m["signal"] for m in data["maps"]] == ["param_grad_norm", "update_ratio"]


def test_hostile_strings_stay_text():
    text = page(samples.hostile_chart(), samples.hostile_checkup())
    document = Document(text)
    assert [tag for tag, _ in document.tags].count("script") == 2
    assert not [tag for tag, _ in document.tags if tag == "img"]
    assert not [attrs for _, attrs in document.tags if any(name.startswith("on") for name in attrs)]
    assert "49" not in document.texts["h1"][0]
    assert "{{7*7}}" in document.visible
    data = document.texts["script"][0]
    assert not set("<>&\u2028\u2029") & set(data)
    rows = json.loads(data)["maps"][0]["rows"]
    assert rows
    assert all("<script>alert(1)" in row for row in rows)
    assert "\u202e" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize("checkup", [samples.healthy_checkup(), Checkup(), Checkup((), (), {"causal-leak": "no loss was seen"})])
def test_every_verdict_has_a_page(checkup: Checkup):
    document = Document(page(Chart(), checkup))
    assert checkup.verdict.upper() in document.texts["h1"][0]


def test_a_limit_tells_its_source():
    limit = Threshold(5.0, "x median", source="Smith 2020, table 3")
    finding = Diagnosis("s", (Evidence(Reading(3, "grad_norm", 9.0), limit),), "note", condition="causal-leak")
    text = re.sub(r"\s+", " ", Document(page(Chart(), Checkup((finding,)))).visible)
    assert "limit from Smith 2020, table 3" in text
    assert "x median" in text


def test_the_vendored_files_are_the_published_ones():
    vendor = resources.files("sickbay.report") / "vendor"
    sums = dict(re.findall(r"\| (\S+) \| ([0-9a-f]{64}) \|", (vendor / "README.md").read_text(encoding="utf-8")))
    assert sums.keys() == {"uPlot.iife.min.js", "uPlot.min.css"}
    for name, expected in sums.items():
        content = (vendor / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == expected
        assert b"\r" not in content  # a parser would turn it into a line feed and the policy's hash would not match
        assert b"</script" not in content.lower()
    assert "(v1.6.32)" in (vendor / "uPlot.iife.min.js").read_text(encoding="utf-8")[:200]
    assert "MIT License" in (vendor / "LICENSE").read_text(encoding="utf-8")


def test_thinning_keeps_every_peak_dip_and_hole():
    rng = np.random.default_rng(0)
    values = rng.normal(5, 0.1, 50_000)
    values[[12_345, 30_001]] = 50.0, -40.0
    values[[777, 40_000]] = math.nan, math.inf
    found = curves.all_curves(Chart(Reading(step, "loss", float(v)) for step, v in enumerate(values)))[0]
    assert len(found.steps) <= 2 * curves.MAX_POINTS
    by_step = dict(zip(found.steps, found.lines[0].values))
    assert (by_step[12_345], by_step[30_001]) == (50.0, -40.0)
    assert by_step[777] is None
    assert by_step[40_000] is None
    assert found.lost == [777, 40_000]
    assert "lowest -40, highest 50" in found.caption


def test_a_log_axis_only_where_all_is_positive_and_wide():
    def is_log(values: list[float]) -> bool:
        return curves.all_curves(Chart(Reading(step, "grad_norm", v) for step, v in enumerate(values)))[0].log

    assert is_log([1.0, 1000.0])
    assert not is_log([1.0, 2.0])
    assert not is_log([0.0, 1.0, 1000.0])
    assert not is_log([math.nan, math.nan])


def test_the_loss_chart_shows_evaluation_and_chance():
    readings = [Reading(s, "loss", 3.0) for s in range(4)] + [Reading(2, "eval_loss", 3.5), Reading(0, "chance_loss", 4.0)]
    (found,) = curves.all_curves(Chart(readings))
    assert [(line.label, line.dashed) for line in found.lines] == [("loss", False), ("eval_loss", False), ("uniform guess", True)]
    assert found.lines[1].values == [None, None, 3.5, None]
    assert found.lines[2].values == [4.0] * 4
    assert curves.all_curves(Chart([Reading(0, "chance_loss", 4.0)])) == []


def grid_of(steps: int, places: list[str], value) -> heatmap.Grid:
    found = heatmap.grid(
        Chart(Reading(s, "param_grad_norm", value(s, i), p) for s in range(steps) for i, p in enumerate(places)), "param_grad_norm"
    )
    assert found is not None
    return found


def test_a_small_grid_is_shown_as_it_is():
    found = grid_of(3, ["a", "b"], lambda s, i: s + 10.0 * i)
    assert found.rows == ["a", "b"]
    assert found.columns == [(0, 0), (1, 1), (2, 2)]
    assert found.values.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert found.merged == 0


def test_a_large_grid_is_merged_by_its_largest():
    places = [f"h.{layer}.{part}.{kind}" for layer in range(30) for part in ("attn", "mlp") for kind in ("weight", "bias")]
    found = grid_of(500, places, lambda s, i: 99.0 if (s, i) == (250, 60) else math.inf if (s, i) == (400, 3) else 1.0)
    assert len(found.rows) == 30  # by layer: 60 submodules would be too many
    assert len(found.columns) <= heatmap.MAX_COLUMNS
    assert found.columns[0][0] == 0
    assert found.columns[-1][1] == 499
    hot = np.argwhere(found.values == 99.0)
    assert [found.rows[row] for row, _ in hot] == ["h.15"]
    assert all(found.columns[column][0] <= 250 <= found.columns[column][1] for _, column in hot)
    assert [found.rows[row] for row, _ in np.argwhere(np.isinf(found.values))] == ["h.0"]
    assert found.merged == 120


def test_many_unrelated_places_are_merged_with_their_neighbours():
    found = grid_of(1, [f"p{i}" for i in range(1000)], lambda s, i: float(i + 1))
    assert len(found.rows) == heatmap.MAX_ROWS
    assert found.rows[0] == "p0 to p17"
    assert found.values[0, 0] == 18.0


def test_what_was_not_measured_stays_empty_and_what_was_not_finite_stands_out():
    readings = [Reading(0, "update_ratio", 1.0, "a"), Reading(1, "update_ratio", math.nan, "b")]
    found = heatmap.grid(Chart(readings), "update_ratio")
    assert found is not None
    drawn = heatmap.drawing(found, [(1, "1 x", "note")])
    assert drawn.data["values"] == [[1.0, None], [None, "not finite"]]
    assert {level for level, _ in drawn.paths} == {"q12", "lost"}
    assert drawn.lost
    column = heatmap.MAP_WIDTH / 2
    assert drawn.marks == [(heatmap.LABEL_WIDTH + 1.5 * column, "1 x", "note")]


def test_nothing_measured_is_no_map():
    assert heatmap.grid(Chart(), "param_grad_norm") is None


def test_a_docstring_becomes_headings_paragraphs_lists_and_code():
    doc = "First line,\nsecond.\n\nLooks like\n----------\n- one\n  more\n- two\n\nCure\nUse `x < 1`.\n\n    loss.backward()\n    step()\n\nSources\nhttps://example.org/a?b=1&c."
    found = blocks(doc)
    assert [block.kind for block in found] == ["paragraph", "heading", "list", "heading", "paragraph", "code", "heading", "paragraph"]
    assert found[0].text == "First line, second."
    assert found[2].items == ["one more", "two"]
    assert found[4].text == "Use <code>x &lt; 1</code>."
    assert found[5].text == "loss.backward()\nstep()"
    assert 'href="https://example.org/a?b=1&amp;c"' in found[7].text


def test_sections_may_be_indented_or_ruled():
    found = blocks("First.\n\nWhy\n---\nA.\n\nCure\n    B,\n    c.\n\n        code()\n\nSources\n    D.")
    assert [(block.kind, str(block.text)) for block in found] == [
        ("paragraph", "First."),
        ("heading", "Why"),
        ("paragraph", "A."),
        ("heading", "Cure"),
        ("paragraph", "B, c."),
        ("code", "code()"),
        ("heading", "Sources"),
        ("paragraph", "D."),
    ]


def test_prose_cannot_smuggle_a_tag():
    assert inline('<img src=x> "https://e.org/"onmouseover=') == (
        '&lt;img src=x&gt; &#34;<a href="https://e.org/" rel="noreferrer noopener">https://e.org/</a>&#34;onmouseover='
    )
