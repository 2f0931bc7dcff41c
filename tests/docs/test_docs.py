"""What the documents show runs, and what they claim is what runs left behind."""

import ast
import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.cli.run_settings import resolve
from tl_paramdecomp.cli.settings_paths import read_tree
from tl_paramdecomp.pretrained import grammar

ROOT = Path(__file__).parents[2]
NEEDS_HUB_AND_GPU = 'device="cuda"'
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


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


def python_in(page):
    """Python blocks of a page, by the line they begin at: those that say so, and those that use the package."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"(?ms)^```(\w*)\n(.*?)^```", text):
        if match[1] in ("python", "py") or (not match[1] and "tlpd." in match[2]):
            yield text.count("\n", 0, match.start()) + 1, match[2]


PYTHON = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}:{line}") for page in PAGES for line, code in python_in(page)
] + [
    pytest.param(script.read_text(encoding="utf-8"), id=str(script.relative_to(ROOT)))
    for script in sorted((ROOT / "examples").glob("*.py"))
]


@pytest.mark.parametrize("code", PYTHON)
def test_what_pages_and_examples_import_is_there(code, monkeypatch):
    """Every block compiles, and its import statements run, also where its model cannot be loaded here."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    tree = ast.parse(code)
    compile(tree, "page", "exec")
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), "page", "exec"), names)
    for name in re.findall(r"\btlpd\.(\w+)", code):
        assert hasattr(tlpd, name), name


def test_every_page_with_python_is_looked_at():
    found = {param.id.split(":")[0] for param in PYTHON}
    assert {"README.md", "docs/training.md", "docs/circuits.md", "docs/methods.md"} <= found
    assert sum(param.id.startswith("README.md") for param in PYTHON) == len(BLOCKS) == 3


def test_dotted_names_of_host_libraries_are_there():
    """What pages, docstrings and messages call by its whole path."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES if page.name not in ("architectures.md", "results.md")]
    texts += [path.read_text(encoding="utf-8") for path in (ROOT / "tl_paramdecomp").rglob("*.py")]
    found = {name for text in texts for name in re.findall(r"\b(?:transformer_lens|nnsight)(?:\.\w+)+", text)}
    assert "transformer_lens.model_bridge.TransformerBridge.boot_transformers" in found
    for name in found:
        first, *rest = name.split(".")
        here = importlib.import_module(first)
        for i, part in enumerate(rest):
            if not hasattr(here, part):
                importlib.import_module(".".join([first, *rest[: i + 1]]))
            here = getattr(here, part)


def test_the_recipe_runs_on_a_model_that_is_here(monkeypatch, tmp_path):
    """Every line but for the loading and the number of steps, on micro-gpt2."""
    bridge = pytest.importorskip("transformer_lens.model_bridge")
    (code,) = [block for block in BLOCKS.values() if NEEDS_HUB_AND_GPU in block]
    asked, model = [], tlpd.load_micro_gpt2("transformer_bridge")

    def boot(name, device):
        asked.append((name, device))
        return model

    def rows(dataset, model, length):
        asked.append((dataset, length))
        return tlpd.micro_gpt2_tokens(8)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bridge.TransformerBridge, "boot_transformers", boot)
    monkeypatch.setattr(tlpd, "token_batches", rows)
    names = {}
    exec(code.replace("steps=20_000, batch_size=16", "steps=1, batch_size=2"), names)
    assert asked == [("gpt2", "cuda"), ("monology/pile-uncopyrighted", 128)]
    assert names["dec"].info["run"]["steps"] == 1 and (tmp_path / "runs" / "gpt2-mlp0" / "decomposition").is_dir()


@pytest.mark.parametrize("heading", list(BLOCKS))
def test_readme_blocks_run(heading, tmp_path):
    code = BLOCKS[heading]
    if NEEDS_HUB_AND_GPU in code:
        pytest.skip("this block needs the hub and a GPU")
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    shown = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert shown.returncode == 0, shown.stderr


def test_the_blocks_of_the_page_on_circuits_run(capsys):
    """On micro-gpt2, with what the page takes for granted."""
    model, rows = tlpd.load_micro_gpt2(), tlpd.micro_gpt2_tokens(4)
    sites = ["blocks.0.mlp.W_in", "blocks.1.attn.W_V", "blocks.1.mlp.W_out", "blocks.2.mlp.W_out"]
    dec = tlpd.decompose(model, sites, tlpd.SVD(training=None), progress=False)
    search, test = (tlpd.make_task("ioi", model, 8, split=split) for split in ("validation", "test"))
    names = {
        "tlpd": tlpd, "model": model, "dec": dec, "rows": rows, "tokens": rows[:1, :20], "other_prompt": rows[1:2, :20],
        "vector": torch.ones(64), "metric": tlpd.LogitDifference(), "search_task": search, "test_task": test,
    }  # fmt: skip
    page = (ROOT / "docs" / "circuits.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^```\n(.*?)^```", page)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert "adversarial" in capsys.readouterr().out and names["circuit"].prompts == 8
    for name in re.findall(r"`tlpd\.(\w+)", page):
        assert hasattr(tlpd, name), name


def test_the_blocks_of_the_page_on_runs_that_last_are_true(tmp_path, monkeypatch):
    """The run goes on bit for bit and is there again; its folder is what is drawn; the run file has keys that there are."""
    monkeypatch.chdir(tmp_path)
    words = [word for word in grammar.VOCABULARY[1:] if word.isalpha()]
    Path("words.txt").write_text(" ".join(random.Random(0).choices(words, k=20_000)), encoding="utf-8")
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    fenced = re.findall(r"(?ms)^```(\w*)\n(.*?)^```", page)
    code, drawn, run_file = ([text for kind, text in fenced if kind == wanted] for wanted in ("python", "", "yaml"))
    model = tlpd.load_micro_gpt2()
    names = {"tlpd": tlpd, "text_file": "words.txt", "model": model, "tokenizer": tlpd.micro_gpt2_tokenizer()}
    (block,) = code
    exec(block.replace("steps=40", "steps=40, callbacks=[lambda info: tlpd.STOP if info.step == 20 else None]"), names)
    assert names["dec"].info["stopped_after"] == 20
    found = []
    for folder in ("runs/mlp0", "runs/mlp0", "never-stopped"):
        exec(block.replace("runs/mlp0", folder), names)
        found.append(names["dec"].state_dict())
    assert all(torch.equal(each[key], t) for each in found[:2] for key, t in found[2].items())
    (folder,) = [block for block in drawn if block.startswith("runs/")]
    listed = re.findall(r"(?m)^  (\S+?)/? ", folder)
    assert set(listed) - {"resolved.yaml"} == {
        path.name for path in Path("runs/mlp0").iterdir() if path.name != ".lock"
    }
    Path("RUN.yaml").write_text(*run_file, encoding="utf-8")
    settings = resolve(read_tree(Path("RUN.yaml")))
    assert settings.method.n_components == 1024 and settings.evaluate.every == 2000 and settings.tensorboard
    for name in re.findall(r"`tlpd\.(\w+)", page):
        assert hasattr(tlpd, name), name


def test_the_results_page_is_what_the_result_files_say():
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs" / "make_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run python docs/make_results.py"
    assert module.BELIEVE.read_text(encoding="utf-8") == module.believing(), "run python docs/make_results.py"


def test_links_in_the_documents_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
