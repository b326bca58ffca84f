"""The report: JSON there and back, HTML that is complete and safe, figures whose dots and labels are where they belong."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from html.parser import HTMLParser

import pytest

from modelopt.core.errors import CheckpointError, ConfigError
from modelopt.evaluate.report import (
    Data,
    Export,
    LayerError,
    Original,
    Report,
    Row,
    environment,
    model_card,
    read_report,
    render_html,
    write_html,
    write_json,
)
from modelopt.evaluate.report.figures import kl_by_format, kl_text, layer_error, size_against_loss
from modelopt.evaluate.report.svg import Axis, log_axis, number, text_width


def row(name, size, kl, error=0.001, layers=()):
    return Row(name, "i4[64]*f16", 4.25, size, kl, error, kl * 4, 0.9, 40.0, 1.5, layers=layers)


def report(**changes):
    layers = tuple(
        LayerError(f"model.layers.{i}.{kind}", "i4", 0.05 + 0.01 * i, None) for i in range(4) for kind in ("q_proj", "up_proj")
    )
    rows = (row("good", 150_000_000, 0.004), row("same-a", 110_000_000, 0.4, 0.2, layers), row("same-b", 110_100_000, 0.41))
    values = {
        "title": "Three <formats> & one model",
        "original": Original("a/model", 10_000_000, 269_000_000, 16.0, 37.03, "somewhere"),
        "data": Data("pydoc", "evaluation", 8, 512, 4096, "none"),
        "rows": rows,
        "export": Export("good", "compressed-tensors", "transformers", 0.01, True, "Q:", " <script>alert(1)</script>"),
        "recipe": {"steps": ["</pre><script>"]},
        "notes": ("a note",),
    }
    return Report(**{**values, **changes})


def elements(svg, tag):
    return list(xml.fromstring(svg).iter("{http://www.w3.org/2000/svg}" + tag))


def test_json_there_and_back(tmp_path):
    original = report()
    path = write_json(original, tmp_path / "deep" / "report.json")
    assert read_report(path) == original
    data = json.loads(path.read_text())
    assert data["schema"] == 1 and data["rows"][0]["kl"] == 0.004 and data["environment"]["torch"]
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_values_that_are_not_finite_stay_json(tmp_path):
    path = write_json(
        report(rows=(dataclasses.replace(row("x", 1, 0.1), perplexity=math.inf, kl_standard_error=None),)), tmp_path / "r.json"
    )
    back = read_report(path)
    assert math.isnan(back.rows[0].perplexity) and back.rows[0].kl_standard_error is None
    assert "NaN" not in path.read_text() and "<svg" in render_html(back)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=9), "no report of schema 1"),
        (lambda d: d["rows"][0].update(klx=1), r'rows\[0\].*unknown key "klx".*"kl"'),
        (lambda d: d["rows"][0].update(kl="1"), "a number is wanted"),
        (lambda d: d["rows"][1].update(layers=[3]), r"rows\[1\].layers\[0\].*a mapping is wanted"),
        (lambda d: d.update(rows={}), "a list is wanted"),
        (lambda d: d.pop("data"), "a mapping is wanted"),
        (lambda d: d["data"].pop("split"), "incomplete"),
        (lambda d: d["data"].update(split=3), "text is wanted"),
    ],
)
def test_a_file_that_is_no_report(tmp_path, change, message):
    data = report().to_dict()
    change(data)
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        read_report(tmp_path / "r.json")
    with pytest.raises(ConfigError):
        read_report(tmp_path / "none.json")


def test_environment_holds_no_path_and_no_host():
    text = json.dumps(environment())
    assert "/" not in text and set(environment()) >= {"python", "torch", "system"}


def test_html_is_whole_safe_and_alone(tmp_path):
    path = write_html(report(), tmp_path / "report.html")
    text = path.read_text()
    open_tags = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "link", "br"):
                open_tags.append(tag)
            assert tag not in ("script", "link", "img", "iframe") and "src" not in dict(attrs) and "href" not in dict(attrs)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Checker().feed(text)
    assert not open_tags
    assert text.count("<svg") == 3 and "url(" not in text and "@import" not in text
    assert "Three &lt;formats&gt; &amp; one model" in text and "<script" not in text
    for part in ("4,096", "0.00400 ± 0.00100", "a note", "agrees", "37.03", "269"):
        assert part in text
    assert "DOES NOT AGREE" in render_html(report(export=Export("x", "hf", "us", 3.0, False)))


def test_html_of_an_empty_report():
    assert "No format was measured" in render_html(report(rows=(), export=None, recipe=None))


def test_kl_figure_orders_and_places():
    svg = kl_by_format(report())
    names = [e.text for e in elements(svg, "text") if "name" in e.get("class")]
    assert names == ["good", "same-a", "same-b"]
    xs = [float(e.get("cx")) for e in elements(svg, "circle")]
    assert xs == sorted(xs) and xs[1] - xs[0] > 50 * (xs[2] - xs[1])
    dot = elements(svg, "circle")[1]
    bars = [e for e in elements(svg, "line") if e.get("class") == "whisker" and e.get("y1") == e.get("y2") == dot.get("cy")]
    assert len(bars) == 1 and float(bars[0].get("x1")) < xs[1] < float(bars[0].get("x2"))


def test_a_perfect_format_has_no_dot():
    svg = kl_by_format(report(rows=(row("perfect", 1, 0.0, 0.0), row("good", 1, 0.1))))
    assert len(elements(svg, "circle")) == 1 and "perfect" in svg


def test_labels_of_the_scatter_do_not_overlap():
    rows = tuple(row(f"format-{i}", 110_000_000 + i * 300_000, 0.4 * (1 + 0.02 * i)) for i in range(8))
    svg = size_against_loss(report(rows=rows))
    labels = [e for e in elements(svg, "text") if e.get("class") == "label"]
    assert len(labels) == 8
    boxes = [(float(e.get("x")), float(e.get("y")), text_width(e.text)) for e in labels]
    for i, (x, y, width) in enumerate(boxes):
        assert x >= 0 and x + width <= 760
        for x2, y2, width2 in boxes[:i]:
            assert x + width <= x2 or x2 + width2 <= x or abs(y - y2) >= 12


def test_the_front_joins_what_nothing_beats():
    rows = (
        row("small", 100, 1.0),
        row("beaten", 150, 1.5),
        row("middle", 200, 0.5),
        row("big", 300, 0.1),
        row("useless", 400, 0.2),
    )
    svg = size_against_loss(report(rows=rows))
    (front,) = elements(svg, "polyline")
    assert len(front.get("points").split()) == 3


def test_layer_panels():
    svg = layer_error(report())
    lines = elements(svg, "polyline")
    assert len(lines) == 2 and all(len(line.get("points").split()) == 4 for line in lines)
    ys = [float(p.split(",")[1]) for p in lines[0].get("points").split()]
    assert ys == sorted(ys, reverse=True)  # a larger error lies higher
    assert layer_error(report(rows=(row("x", 1, 0.1),))) == ""
    assert layer_error(report(rows=(row("x", 1, 0.1, layers=(LayerError("lm_head", "", 0.1, None),)),))) == ""


def test_axes():
    assert Axis(0, 10, 0, 100)(2.5) == 25 and Axis(1, 100, 0, 100, log=True)(10) == pytest.approx(50)
    assert Axis(0, 10, 0, 100)(50) == 100
    assert Axis(0, 269 * 1.08, 0, 1).ticks() == [0, 100, 200]
    assert Axis(0.002, 3, 0, 1, log=True).ticks() == pytest.approx([0.01, 0.1, 1])
    assert Axis(0.02, 0.2, 0, 1, log=True).ticks() == pytest.approx([0.02, 0.05, 0.1, 0.2])
    axis = log_axis([0.01, 1.0], 0, 100)
    assert axis.low < 0.01 and axis.high > 1
    assert log_axis([], 0, 1).low > 0 and log_axis([0.0, -1.0], 0, 1).low > 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0371, "0.0371"), (1.314, "1.31"), (269.06, "269"), (1234.5, "1234"), (1e-7, "1.00e-07"), (math.nan, "–")],
)
def test_numbers(value, text):
    assert number(value) == text


def test_kl_text():
    assert kl_text(row("x", 1, 0.0371, 0.0012)) == "0.0371 ± 0.0012"
    assert kl_text(row("x", 1, 1.3142, 0.001)) == "1.31 ± 0.001"
    assert kl_text(row("x", 1, 0.5, None)) == "0.500"


def test_model_card():
    card = model_card(report(title="a | b"))
    assert card.startswith("# a \\| b") and "4096 held-out tokens" in card and "logits agree" in card
    table = re.findall(r"^\|.*\|$", card, re.M)
    assert len(table) == 6 and all(line.count("|") == 7 for line in table)


def test_import_is_light():
    code = (
        "import sys, modelopt.evaluate as e; e.Report, e.compare, e.layer_errors, e.smollm2, e.Perplexity;"
        "bad = {'transformers', 'matplotlib', 'tokenizers', 'triton'} & set(sys.modules); assert not bad, bad;"
        "assert all(getattr(e, n) for n in e.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
