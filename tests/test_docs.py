"""What README and docs promise of themselves: code that is the code, links that lead somewhere, and to stay short."""

import re

import pytest
from conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md"), *ROOT.glob("results/figures/*.md")])


def flat(text: str) -> str:
    """Without indentation, which differs where a part of a function is quoted."""
    return "\n".join(line.strip() for line in text.splitlines())


def test_the_readme_quotes_the_step_from_the_code():
    quoted = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert any("reverse_gradient(" in block for block in quoted)
    for block in quoted:
        assert flat(block) in flat((ROOT / "main.py").read_text())


def test_what_is_short_stays_short():
    """The README, the method from the first line of its objective to the last of its loop, the number of results."""
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme) <= 12_288
    assert len(readme.splitlines()) <= 200
    lines = (ROOT / "main.py").read_text().splitlines()
    first = lines.index("class DannObjective(nn.Module):")
    loop = next(number for number, line in enumerate(lines) if line.startswith("def train("))
    last = next(number for number in range(loop + 5, len(lines)) if lines[number].startswith(("def ", "class ")))
    assert last - first < 110
    assert sum(path.is_file() for path in (ROOT / "results").rglob("*")) < 80


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", goal.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {link}"
