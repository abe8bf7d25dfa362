"""The report in a real browser: everything is drawn, the filter works, nothing is fetched and nothing fails."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from control_experiments.paths import REPOSITORY
from control_experiments.reporting.report import Axis, family

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def page(new_results):
    results = new_results()
    for seed in (1, 2):
        for method, peak in (("control", 80), ("lora", 100), ("dora", 120)):
            results.roberta(method, seed, 0.6 + seed / 100, peak=peak * 2**20)
    results.llama("double control", 1, 50.0)
    results.benchmark(lora=(0.4, 40.0), control_fast=(0.2, 13.0), control_lean=(0.3, 1.0))
    command = [sys.executable, str(REPOSITORY / "scripts" / "make_tables.py"), "--results", str(results.path)]
    subprocess.run(command, check=True, capture_output=True)
    return results.path / "report.html"


def chromium(page: Path, *options: str, profile: Path) -> subprocess.CompletedProcess:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
               "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", *options, page.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_page_is_self_contained(page):
    text = page.read_text()
    assert not re.search(r"(?:https?:)?//[\w.-]+\.\w", text)
    assert not re.search(r"<(?:script|img|iframe)[^>]+src=|<link|@import|url\(", text)
    for link in re.findall(r'href="([^"#]+)"', text):
        assert (page.parent / link).exists()


@browser
def test_the_script_runs_without_errors(page, tmp_path):
    done = chromium(page, "--dump-dom", profile=tmp_path / "profile")
    # a mark a run (6), a curve a run (6), a point a benchmarked method (3), LLaMA's one run
    assert re.search(r'<html[^>]* data-ready="16"', done.stdout)
    assert "CONSOLE" not in done.stderr
    assert "<title>" not in done.stdout.split("<body>")[1]


@browser
def test_the_filter_hides_other_domains_and_methods(page, tmp_path):
    text = page.read_text()
    text = text.replace('value="lora" checked', 'value="lora"').replace(
        'value="llama" checked', 'value="llama"'
    )
    filtered = page.with_name("filtered.html")
    filtered.write_text(text)
    dom = chromium(filtered, "--dump-dom", profile=tmp_path / "profile").stdout.split("<body>")[1]
    for kind, hidden in (("method", "lora"), ("domain", "llama")):
        elements = re.findall(rf'<[^>]*data-{kind}="([^"]+)"[^>]*>', dom)
        tags = re.findall(rf'<[^>]*data-{kind}="[^"]+"[^>]*>', dom)
        assert hidden in elements and len(set(elements)) > 1
        for value, tag in zip(elements, tags, strict=True):
            assert ('hidden=""' in tag) == (value == hidden), tag


@browser
def test_a_tap_on_a_mark_shows_its_figures(page, tmp_path):
    tap = '<script>document.querySelector("#score-memory ~ .figures [data-domain=roberta] .mark").dispatchEvent(new MouseEvent("click", {bubbles: true}))</script>'
    tapped = page.with_name("tapped.html")
    tapped.write_text(page.read_text().replace("</body>", f"{tap}</body>"))
    dom = chromium(tapped, "--dump-dom", profile=tmp_path / "profile").stdout
    (tip,) = re.findall(r'<div id="tip" role="tooltip" style="[^"]+">([^<]+)</div>', dom)
    assert tip == "control, seed 1\nlast score 61.00 %\npeak 80 MiB"


@browser
@pytest.mark.parametrize("width", [1280, 500])
def test_it_is_drawn_at_desktop_and_phone_width(page, tmp_path, width):
    picture = tmp_path / "page.png"
    chromium(page, f"--window-size={width},5200", f"--screenshot={picture}", profile=tmp_path / "profile")
    image = Image.open(picture).convert("RGB")
    assert image.size[0] == width
    colours = {colour: count for count, colour in image.getcolors(maxcolors=2**24)}
    assert len(colours) > 100
    for drawn in ((0x16, 0x68, 0xC7), (0xC2, 0x5A, 0x00)):  # control's and lora's marks
        assert colours.get(drawn, 0) > 50


@browser
def test_only_tables_are_wider_than_a_phone(page, tmp_path):
    """They scroll within themselves; the page does not."""
    measure = (
        "<script>document.title = document.documentElement.scrollWidth + ' of ' + window.innerWidth</script>"
    )
    measured = page.with_name("measured.html")
    measured.write_text(page.read_text().replace("</body>", f"{measure}</body>"))
    dom = chromium(measured, "--window-size=500,2600", "--dump-dom", profile=tmp_path / "profile").stdout
    (found,) = re.findall(r"<title>(\d+) of (\d+)</title>", dom)
    assert int(found[0]) <= int(found[1]) == 500


@pytest.mark.parametrize(
    ("label", "name"),
    [("control r64, lean", "control"), ("control+liger:plain", "control"), ("control+graphs:fast", "control"), ("control+lora r64+r32", "control+lora"),
     ("lora+liger+checkpointing", "lora"), ("lora matched", "lora"), ("double control r32", "double control"),
     ("zero-shot", "other")],
)  # fmt: skip
def test_families(label, name):
    assert family(label) == name


def test_axes_map_their_ends_and_keep_ticks_inside():
    axis = Axis.over([1.0, 100.0], "GB", 200, 0, logarithmic=True)
    assert axis.place(10.0) == pytest.approx(100)
    assert axis.ticks() == pytest.approx([1, 2, 5, 10, 20, 50, 100])
    flat = Axis.over([5.0, 5.0], "same", 0, 100)
    assert flat.place(5.0) == pytest.approx(50)
