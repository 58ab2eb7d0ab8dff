import re
import xml.etree.ElementTree as ET

import numpy as np

from nmlightning.reports.page import Line, draw_lines

SPACE = "{http://www.w3.org/2000/svg}"


def make_line(y: list[float], **options: bool) -> Line:
    return Line("<name>", "#123456", np.arange(float(len(y))), np.array(y), **options)


def draw(*lines: Line, logarithmic: bool = False) -> ET.Element:
    return ET.fromstring(draw_lines(lines, "a & b", "epoch", logarithmic=logarithmic))


def test_a_line_spans_the_chart() -> None:
    (path,) = draw(make_line([0.0, 1.0, 0.5]), make_line([])).findall("path")[:1]
    assert path.get("stroke") == "#123456"
    assert path.findtext("title") == "<name>"
    assert re.findall(r"[ML]([\d.]+) ([\d.]+)", path.get("d", "")) == [
        ("58.0", "220.0"),
        ("253.0", "30.0"),
        ("448.0", "125.0"),
    ]


def test_gaps() -> None:
    (path,) = draw(make_line([0.0, 1.0, np.nan, np.inf, 2.0])).findall("path")
    assert [p[0] for p in path.get("d", "").split(" ") if p[0] in "ML"] == ["M", "L", "M"]
    (path,) = draw(make_line([1.0, 0.0, 10.0]), logarithmic=True).findall("path")
    assert path.get("d", "").count("M") == 2


def test_a_long_line_is_thinned_and_keeps_its_ends() -> None:
    (path,) = draw(make_line(list(range(5000)))).findall("path")
    places = re.findall(r"[ML]([\d.]+) ([\d.]+)", path.get("d", ""))
    assert len(places) == 400
    assert places[0] == ("58.0", "220.0")
    assert places[-1] == ("448.0", "30.0")


def test_words() -> None:
    chart = draw(make_line([0.0, 1.0], faint=True))
    assert chart.get("aria-label") == "a & b"
    texts = [text.text for text in chart.findall("text")]
    assert {"a & b", "epoch", "0.2"} < set(texts)
    (path,) = chart.findall("path")
    assert path.get("class") == "faint"
