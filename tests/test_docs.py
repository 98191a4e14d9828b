"""What README and docs promise of themselves: code that is the code, links that lead somewhere."""

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md"), *ROOT.glob("results/figures/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_quotes_the_step_from_the_code():
    code = [textwrap.dedent(part) for part in re.split(r"\n(?=\S)", (ROOT / "main.py").read_text())]
    flat = "\n".join(line.strip() for part in code for line in part.splitlines())
    quoted = blocks(ROOT / "README.md", "python")
    assert any("reverse_gradient(" in block for block in quoted)
    for block in quoted:
        assert "\n".join(line.strip() for line in block.splitlines()) in flat


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 12_288
    assert len(text.splitlines()) <= 200


def test_the_method_is_short():
    """From the first line of the objective to the last of the loop."""
    lines = (ROOT / "main.py").read_text().splitlines()
    first = lines.index("class DannObjective(nn.Module):")
    loop = next(number for number, line in enumerate(lines) if line.startswith("def train("))
    last = next(number for number in range(loop + 5, len(lines)) if lines[number].startswith(("def ", "class ")))
    assert last - first < 110


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
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


def test_results_are_few_files():
    assert sum(path.is_file() for path in (ROOT / "results").rglob("*")) < 80
