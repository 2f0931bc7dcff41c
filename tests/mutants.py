"""Faults of the core, each of which a test in its room must catch: python tests/mutants.py [WORD ...]

Each is put into a copy of the package, and its tests run there until the first that fails. With words: only those whose names
hold one of them. Exit status 1 where one was missed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """A fault, and who should notice."""

    name: str
    file: str
    """In the package."""
    old: str
    """Stands there once."""
    new: str
    tests: str
    """As pytest takes them."""


MUTANTS = (
    Mutant(
        "sign of the delta component", "components/masked_output.py",
        "return 1.0 - self.a", "return 1.0 + self.a", "tests/components/test_masked_output.py",
    ),
    Mutant(
        "a mask off by one position", "components/positions.py",
        "here = torch.arange(span.start, span.start + rows[-1])",
        "here = torch.arange(span.start + 1, span.start + rows[-1] + 1)", "tests/components/test_masks.py",
    ),
    Mutant(
        "importance not clamped", "components/sigmoids.py",
        "lower = raw.clamp(0.0, 1.0)", "lower = raw.clamp(min=0.0)", "tests/components/test_importance.py",
    ),
    Mutant(
        "an adversary that steps down", "methods/adversary.py",
        "source + step_size * gradient.sign()", "source - step_size * gradient.sign()", "tests/methods/test_adversary.py",
    ),
    Mutant(
        "a loss averaged twice", "methods/divergence.py",
        "self.target, self.probs) / max(1, len(self.target))", "self.target, self.probs) / max(1, len(self.target)) ** 2",
        "tests/methods/test_divergence.py",
    ),
    Mutant(
        "KL the other way round", "methods/divergence.py",
        "value = (log_p - log_q).mul_(p).sum()", "value = (log_q - log_p).mul_(log_q.exp()).sum()",
        "tests/methods/test_divergence.py",
    ),
    Mutant(
        "the weights of microbatches ignored", "methods/loss.py",
        "share, weight = (place.share, place.weight) if", "share, weight = (1.0, place.weight) if",
        "tests/methods/test_divided.py",
    ),
    Mutant(
        "a resume that forgets where the schedule stands", "training/checkpoint.py",
        "state.done = checkpoint.step", "state.done = checkpoint.step - 1", "tests/training/test_resume.py",
    ),
    Mutant(
        "a resume that forgets the adversary", "training/checkpoint.py",
        "for key, t in memory.items()}", "for key, t in memory.items() if False}", "tests/training/test_resume.py",
    ),
    Mutant(
        "positions of generation off by one", "adapters/passes.py",
        "interception.begin(cached_columns(kwargs), input_rows(args, kwargs))",
        "interception.begin(max(0, cached_columns(kwargs) - 1), input_rows(args, kwargs))",
        "tests/patching/test_generation.py",
    ),
    Mutant(
        "a checksum that is not compared", "components/files.py",
        "if text != sealed(text.rpartition(SEAL)[0]):", "if False:",
        "tests/components/test_hostile_files.py tests/test_corrupt_files.py",
    ),
    Mutant(
        "rows without their beginning", "data/tokenizer.py",
        "return () if self.bos is None else (self.bos,)", "return ()", "tests/data",
    ),
    Mutant(
        "singular directions from the smallest on", "methods/starts.py",
        "return left * root, root.unsqueeze(-1) * right", "return (left * root).flip(1), (root.unsqueeze(-1) * right).flip(0)",
        "tests/methods/test_baselines.py",
    ),
    Mutant(
        "faithfulness to minus the weight", "methods/losses.py",
        ", v, u, alpha=-1.0)", ", v, u, alpha=1.0)",
        "tests/methods/test_losses.py",
    ),
)  # fmt: skip


def caught(mutant: Mutant) -> tuple[bool, str]:
    """Whether a test fails, and which."""
    with tempfile.TemporaryDirectory() as place:
        for name in ("tl_paramdecomp", "tests"):
            shutil.copytree(ROOT / name, Path(place, name), ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, place)
        path = Path(place, "tl_paramdecomp", mutant.file)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text.count(mutant.old) != 1:
            return False, f"{mutant.file} holds {mutant.old!r} {text.count(mutant.old)} times, not once"
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests.split()]
        offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        shown = subprocess.run(
            command, cwd=place, capture_output=True, text=True, env={**os.environ, **offline, "PYTHONPATH": place}
        )
    failed = [line for line in shown.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return shown.returncode == 1 and bool(failed), failed[0] if failed else shown.stdout[-300:]


def main() -> None:
    """Try them all."""
    words, missed = sys.argv[1:], 0
    for mutant in MUTANTS:
        if words and not any(word in mutant.name for word in words):
            continue
        begun = time.perf_counter()
        found, told = caught(mutant)
        missed += not found
        print(
            f"{'caught' if found else 'MISSED'}  {mutant.name}  ({time.perf_counter() - begun:.0f} s)  {told:.150}",
            flush=True,
        )
    raise SystemExit(missed > 0)


if __name__ == "__main__":
    main()
