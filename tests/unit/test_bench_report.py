"""From the benchmarks' JSON to the tables and plots of docs/performance.md. Nothing is timed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import document
from bench.parts import BEFORE, PARTS, Part, Run
from bench.report import Report, Row, Value
from bench.tables import NAME, Layout, grid, layouts_for, markdown

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}svg"
MACHINE: dict[str, Value] = {"cpu": "a CPU", "processors": 2, "kernel": "6.18.0", "load": 1.5}
PART = {part.name: part for part in PARTS}

CONNECTED = (
    Row("connected", "ms", (1020.0, 1021.0, 1022.0), {"way": "stock", "one way": "0 ms"}),
    Row("connected", "ms", (12.0, 13.0, 14.0), {"way": "gate, exec", "one way": "0 ms"}),
    Row("connected", "ms", (3633.0,), {"way": "stock", "one way": "300 ms"}),
    Row("SYNs again", "", (1.0, 1.0, 1.0), {"way": "stock", "one way": "0 ms"}),
    Row("SYNs again", "", (0.0, 0.0, 0.0), {"way": "gate, exec", "one way": "0 ms"}),
    Row("packets in clear", "", (0.0,), {"way": "stock"}),
)
FAILURES = tuple(
    Row("told after", "ms", (float(10**n),), {"way": way, "failure": failure, "error": "EPERM"})
    for n, (way, failure) in enumerate(product(("stock", "gate"), ("wrong key", "silent peer")))
)
HOOKS = tuple(
    Row(name, unit, samples, {"call": call})
    for call in ("UDP connect, any covered flow", "sendto, 8 peers")
    for name, unit, samples in (
        ("without", "ns", (700.0, 720.0)),
        ("gated", "ns", (800.0, 900.0)),
        ("ratio", "", (1.1, 1.3)),
    )
)
GROWTH = tuple(
    Row(name, "us", (40.0, 50.0), {"tunnels": tunnels})
    for name, tunnels in product(("close", "open"), (10, 1000, 100_000))
)


def report(part: str, rows: tuple[Row, ...], **settings: float) -> Report:
    return Report(part, "a title", rows, settings, MACHINE)


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = report("growth", GROWTH, turns=3)
    written.write(tmp_path / "new/growth.json")
    assert Report.read(tmp_path / "new/growth.json") == written


def test_quartiles_lie_within_the_samples() -> None:
    assert Row("a", "", (5.0,)).quartiles == (5.0, 5.0)
    assert Row("a", "", (1.0, 9.0)).quartiles == (3.0, 7.0)


def test_a_layout_says_what_goes_down_and_across() -> None:
    table = markdown(grid(CONNECTED, Layout(("connected",), ("way",), ("one way",))))
    assert table == (
        "| way | 0 ms | 300 ms |\n"
        "| --- | ---: | ---: |\n"
        "| stock | 1,021 ms (1,020 to 1,022) | 3,633 ms |\n"
        "| gate, exec | 13 ms (12.5 to 13.5) |  |\n"
    )


def test_a_cell_can_begin_with_a_property_and_end_with_the_worst() -> None:
    row = Row("told", "ms", tuple(float(n) for n in range(101)), {"error": "EPERM"})
    (line,) = grid([row], Layout(down=(), across=("error",), lead="error", tail=True)).lines
    assert line == ("EPERM: 50 ms (25 to 75; 99 of 100 below 99)",)


def test_a_long_time_is_shown_in_seconds() -> None:
    row = Row("told", "ms", (9_999.0,), {"error": "ETIMEDOUT"})
    late = replace(row, samples=(130_000.0, 132_000.0))
    assert grid([row], Layout(down=("error",), across=())).lines[0][1] == "9,999 ms"
    assert grid([late], Layout(down=("error",), across=())).lines[0][1] == "131 s (130 to 132)"


def test_names_and_properties_can_share_an_axis() -> None:
    names = ("SYNs again", "packets in clear")
    made = grid(CONNECTED, Layout(names, ("way",), (NAME, "one way")))
    assert made.head == ("way", "SYNs again, 0 ms", "packets in clear")
    assert made.lines == (("stock", "1", "0"), ("gate, exec", "0", ""))


def test_rows_in_the_same_cell_are_all_shown() -> None:
    two = [Row("a", "ms", (value,), {"x": "b", "error": str(value)}) for value in (1.0, 2.0)]
    assert grid(two, Layout(down=("x",))).lines == (("b", "1; 2"),)


def test_a_part_without_layouts_gets_a_table_for_each_set_of_keys() -> None:
    rows = [
        Row("start", "ms", (150.0,)),
        *(Row(f"memory {n}", "MiB", (20.0,), {"policies": 100}) for n in range(3)),
        *(Row("wake-ups", "1/s", (0.5,), {"process": name}) for name in ("a", "b")),
    ]
    tables = [markdown(grid(rows, layout)) for layout in layouts_for(rows)]
    assert tables == [
        "| measured | median |\n| --- | ---: |\n| start, ms | 150 |\n",
        "| measured | 100 policies |\n| --- | ---: |\n"
        "| memory 0, MiB | 20 |\n| memory 1, MiB | 20 |\n| memory 2, MiB | 20 |\n",
        "| process | wake-ups, 1/s |\n| --- | ---: |\n| a | 0.5 |\n| b | 0.5 |\n",
    ]


def test_the_reports_of_several_runs_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    old = Report("hot_path", "", (Row("ratio", "", (9.0,), {"call": "sendto, 8 peers"}),))
    old.write(tmp_path / "hot_path.json")
    runs = [report("hot_path", HOOKS, selectors=n, masks=32, turns=3) for n in (10, 16384)]
    rows = PART["hot_path"].rows(runs, before=tmp_path)
    assert rows[0].of == {"call": "UDP connect, any covered flow", "selectors": 10, "masks": 32}
    assert rows[-1] == replace(old.rows[0], name="ratio, before")


def test_a_document_changes_only_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = document.markers("growth")
    page.write_text(f"before\n{begin}old\n{end}after\n")
    rows = PART["growth"].rows([], before=BEFORE) + list(GROWTH)
    content = document.section(PART["growth"], [report("growth", GROWTH)], rows)
    document.put_into(page, {"growth": content})
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n| tunnels |")
    machine = "a CPU, 2 processors, Linux 6.18.0; the load before it was 1.5."
    assert text.endswith(f"Measured on: {machine}\n\n{end}after\n")
    document.put_into(page, {"growth": content})
    assert page.read_text() == text


def test_the_conditions_of_a_guest_name_its_host() -> None:
    inside: dict[str, Value] = {"cpu": "UML", "processors": 1, "kernel": "6.1.176", "load": 9.0}
    settings: dict[str, Value] = {"host": document.words(MACHINE), "load before": 0.25}
    assert document.conditions([Report("failure", "", (), settings, inside)]) == (
        "Measured on: UML, 1 processor, Linux 6.1.176, "
        "a guest on a CPU, 2 processors, Linux 6.18.0; "
        "the load before it was 0.25."
    )


def test_a_document_without_the_markers_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="no place for growth"):
        document.put_into(page, {"growth": "text"})


def test_every_part_has_its_place_in_the_page() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    for part in PARTS:
        begin, end = document.markers(part.name)
        assert page.count(begin) == page.count(end) == 1
        assert page.index(begin) < page.index(end)


@pytest.mark.parametrize("name", [part.name for part in PARTS if part.before])
def test_what_is_compared_with_before_was_measured_before(name: str) -> None:
    measured = Report.read(BEFORE / f"{name}.json")
    assert set(PART[name].before) <= {row.name for row in measured.rows}


def test_the_command_line_of_a_run_names_its_report() -> None:
    here = Part("x", "", (Run(("bench.x", "--quick"), "-1"),), ())
    assert here.argv(here.runs[0], Path("/r"))[1:] == [
        *("-m", "bench.x", "--quick", "--json", "/r/x-1.json")
    ]
    inside = replace(here, guest=True).argv(here.runs[0], Path("/r"))
    assert inside[1:3] == ["-m", "ipsecgate.lab.guest"]
    assert inside[inside.index("--results") + 1] == "/r"


def plots_in(page: str) -> set[str]:
    """Return the names of the plots that a page shows."""
    return {word.partition(")")[0] for word in page.split("](performance/")[1:]}


def test_the_page_shows_every_plot_and_each_is_an_svg() -> None:
    folder = ROOT / "docs/performance"
    files = {path.name for path in folder.iterdir()}
    assert files == plots_in((ROOT / "docs/performance.md").read_text())
    for name in files:
        assert ElementTree.parse(folder / name).getroot().tag == SVG


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="missing: matplotlib (make bench)"
)
def test_plots_are_svg_files_and_always_the_same(tmp_path: Path) -> None:
    from bench import plots  # noqa: PLC0415 - without matplotlib it cannot be imported

    reports = {
        "first_connection": [report("first_connection", CONNECTED)],
        "failure": [report("failure", FAILURES)],
        "hot_path": [
            report("hot_path", HOOKS, selectors=n, masks=32) for n in (10, 16384, 100_000)
        ],
        "growth": [report("growth", GROWTH)],
    }
    assert reports.keys() == plots.PLOTS.keys()
    for name, some in reports.items():
        rows = PART[name].rows(some)
        first = plots.draw(name, rows, tmp_path / "first")
        second = plots.draw(name, rows, tmp_path / "second")
        assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
        for file in first:
            root = ElementTree.parse(file).getroot()
            assert root.tag == SVG
            assert root.get("width") == "576pt"
            assert f"{tmp_path}" not in file.read_text()
            assert "<dc:date>" not in file.read_text()
