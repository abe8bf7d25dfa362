"""The report: everything is drawn, nothing is fetched, and in a real browser its filter and its tips work."""

import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.path import Path as Line

from control_experiments.reporting import pictures
from scripts import make_tables
from scripts.tests.conftest import ResultsFolder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    results = ResultsFolder(tmp_path_factory.mktemp("report") / "results")
    for seed in (1, 2):
        for method, peak in (("control", 80), ("lora", 100), ("dora", 120)):
            results.roberta(method, seed, 0.6 + seed / 100, peak=peak * 2**20)
    results.roberta("control", 0, 0.6, folder="learning_rate_search/control")
    results.llama("double control", 1, 50.0)
    results.benchmark(lora=(0.4, 40.0), control_fast=(0.2, 13.0), control_lean=(0.3, 1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_tables", "--results", str(results.path)])
        make_tables.main()
    return results.path / "report.html"


def chromium(page: Path, *options: str, profile: Path) -> subprocess.CompletedProcess:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
               "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", *options, page.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_page_is_self_contained_and_its_pictures_name_their_marks(page):
    text = page.read_text()
    assert not re.search(r"(?<!xmlns=\")(?<!xlink=\")https?://", re.sub(r"<!DOCTYPE svg[^>]*>", "", text))
    assert not re.search(r"<(?:script|img|iframe)[^>]+src=|<link|@import|url\((?!#)", text)
    for link in re.findall(r'<a href="([^"#]+)', text):
        assert (page.parent / link).exists()
    marks = re.findall(r'<g id="mark\|([^|"]+)\|([^"]*)"', text)
    # a point and a name of each of 3 benchmarked methods, a mark and a curve of each of 6 runs, LLaMA's mark, a rate, a pool
    assert len(marks) == 2 * 3 + 6 + 6 + 1 + 1 + 1
    assert {name for name, _ in marks} == {"control", "lora", "dora", "double control"}
    said = [tip.replace("&#10;", "\n") for name, tip in marks if name == "control"]
    assert "control, seed 1\nlast score 61.00 %\npeak 80 MiB" in said
    classes = set(re.findall(r' class="(s\d+)"', text))
    assert classes and classes == set(re.findall(r"^\.(s\d+) \{", text, re.MULTILINE))  # styles that repeat stand there alone
    headings = ("Memory against speed", "Score against memory", "Training curves", "Score against learning rate")
    for heading in headings:
        drawn = rf"<h2[^>]*>{heading}</h2>\s*<p>[^<]*</p>\s*<div class=\"figures\">\s*<figure"
        assert re.search(drawn, text), heading


@pytest.mark.parametrize(
    ("points", "names"),
    [
        ({"lora": (0.37, 36e9), "lora+graphs": (0.36, 39e9), "lora-all": (0.41, 33e9), "control:fast": (0.226, 12.9e9),
          "control+graphs:fast": (0.22, 13e9), "control+liger:plain": (0.239, 12.8e9), "control:lean": (0.286, 0.9e9)},
         ["LoRA", "all layers", "fast", "fast, graphs", "graphs", "lean", "plain, liger"]),
        # so near to each other that lines would cross
        ({"control+graphs+fp8:fast": (0.076, 3.86e9), "control+graphs:fast": (0.081, 2.63e9), "control:lean": (0.089, 2.59e9),
          "control+graphs:balanced": (0.083, 2.61e9), "control+graphs:lean": (0.08, 3.76e9), "lora": (0.422, 2.11e9)},
         ["LoRA", "balanced, graphs", "fast, graphs", "fast, graphs, fp8", "lean", "lean, graphs"]),
    ],
)  # fmt: skip
def test_names_of_points_cover_nothing_and_their_lines_do_not_cross(points, names):
    (axes,) = pictures.memory_against_time(points, "title").axes
    texts = [text for text in axes.texts if text.get_text()]
    assert sorted(text.get_text() for text in texts) == names
    boxes = [text.get_window_extent() for text in texts]
    centres = axes.transData.transform([(1000 * x, y / 1e9) for x, y in points.values()])
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
        assert not any(box.contains(*centre) for centre in centres)
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["control", "LoRA", "frontier: no other beats these in both"]
    drawn = [mark for mark in axes.texts if not mark.get_text()]
    offset = axes.figure.dpi / 72
    lines = [
        Line([start, start + [length * offset for length in mark.xyann]])
        for mark, start in zip(drawn, axes.transData.transform([mark.xy for mark in drawn]), strict=True)
    ]
    assert len(lines) > 1 and not any(one.intersects_path(other) for one, other in combinations(lines, 2))


def test_points_that_their_own_kind_beats_have_no_name():
    beaten = {"control+liger:plain": (0.24, 13e9), "lora+graphs": (0.4, 40e9)}
    others = {"control:plain": (0.3, 27e9), "control:fast": (0.22, 12e9), "control+fp8:fast": (0.2, 11e9), "lora": (0.3, 30e9)}
    (axes,) = pictures.memory_against_time(beaten | others, "title").axes
    assert sorted(filter(None, (text.get_text() for text in axes.texts))) == ["LoRA", "fast", "fast, fp8", "plain"]
    small = [line.get_gid().split("|")[2].partition("\n")[0] for line in axes.lines if line.get_markersize() < 5]
    assert small == [*beaten]
    assert axes.get_legend().get_texts()[-1].get_text().startswith("small")


def dom(page: Path, name: str, replaced: dict[str, str], profile: Path) -> str:
    """The page as a browser has it, some of its text replaced."""
    text, changed = page.read_text(), page.with_name(name)
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    changed.write_text(text)
    return chromium(changed, "--dump-dom", profile=profile).stdout


@browser
def test_the_filter_hides_other_domains_and_methods(page, tmp_path):
    unchecked = {f'value="{value}" checked': f'value="{value}"' for value in ("lora", "llama")}
    body = dom(page, "filtered.html", unchecked, tmp_path / "profile").split("<body>")[1]
    for kind, hidden in (("method", "lora"), ("domain", "llama")):
        tags = dict(re.findall(rf'(<[^>]*data-{kind}="([^"]+)"[^>]*>)', body))
        assert {hidden} < set(tags.values())
        assert all(('hidden=""' in tag) == (value == hidden) for tag, value in tags.items())


@browser
def test_a_tap_on_a_mark_shows_its_figures(page, tmp_path):
    tap = """<script>document.querySelector('[id^="mark|control|control, seed 1"]').dispatchEvent(new MouseEvent("click", {bubbles: true}))</script>"""
    tapped = dom(page, "tapped.html", {"</body>": f"{tap}</body>"}, tmp_path / "profile")
    (tip,) = re.findall(r'<div id="tip" role="tooltip" style="[^"]+">([^<]+)</div>', tapped)
    assert tip == "control, seed 1\nlast score 61.00 %\npeak 80 MiB"
