"""What the documents show runs, and what they claim is what runs left behind."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS_THE_HUB = "load_dataset("


def blocks():
    """Python blocks of the README, by the heading they stand under."""
    heading, found = "", {}
    for match in re.finditer(
        r"(?ms)^## ([^\n]+)$|^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8")
    ):
        heading = match[1] or heading
        if match[2]:
            found[heading] = match[2]
    return found


BLOCKS = blocks()


def test_the_readme_has_its_blocks():
    assert {"Ten lines with TransformerLens", "Ten lines with nnsight"} <= set(BLOCKS)


@pytest.mark.parametrize("heading", list(BLOCKS))
def test_readme_blocks_run(heading, tmp_path):
    code = BLOCKS[heading]
    compile(code, heading, "exec")
    if NEEDS_THE_HUB in code:
        pytest.skip("this block needs the hub")
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    shown = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert shown.returncode == 0, shown.stderr


def test_the_results_page_is_what_the_result_files_say():
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs" / "make_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run python docs/make_results.py"
    assert module.BELIEVE.read_text(encoding="utf-8") == module.believing(), "run python docs/make_results.py"


def test_links_in_the_documents_lead_somewhere():
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + list(
        (ROOT / "docs").glob("*.md")
    )
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
