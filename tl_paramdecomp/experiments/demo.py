"""`tl-paramdecomp demo`: the whole path on the embedded model, in minutes and offline.

1. Decompose one MLP layer and one attention layer of micro-gpt2 with SPD.
2. Print how far the model with masked components is from the target, and how many components matter.
3. For one prompt of each task, ablate the component that matters most, and a random one, and look at the next token.
4. Save the run, and say how to open it on another host.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tl_paramdecomp.analysis.effects.sweep import sweep
from tl_paramdecomp.analysis.next_tokens import answer_log_prob, next_token_probs, top_tokens
from tl_paramdecomp.components.decomposition import Decomposition
from tl_paramdecomp.methods.spd import SPD
from tl_paramdecomp.patching.hooks import patched
from tl_paramdecomp.pretrained import (
    TaskPrompt,
    load_micro_gpt2,
    micro_gpt2_prompts,
    micro_gpt2_tokenizer,
    micro_gpt2_tokens,
)
from tl_paramdecomp.report.quality import measure_quality, quality_tables, write_quality
from tl_paramdecomp.training.fit import decompose

if TYPE_CHECKING:
    from rich.console import Console

SITES = ("blocks.0.mlp.*", "blocks.1.attn.*")
TASKS = {
    "ioi": "Indirect object: who was mentioned once",
    "pronoun": "Gendered pronoun",
    "greater_than": "Greater than: a later year",
    "induction": "Induction: what followed last time",
}


def run_demo(console: "Console", out: Path, steps: int, seed: int) -> None:
    """Run the demo and print it."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # the only bar is that of the training
    torch.set_num_threads(1)  # on matrices this small a second thread gains little, and on a busy machine costs much
    model = load_micro_gpt2()
    begun = time.perf_counter()
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"[bold]micro-gpt2[/]: a GPT-2 of {size:,} parameters that comes with the package.", highlight=False)
    console.print(f"Decomposing {' and '.join(SITES)} with SPD, {steps} steps.\n", highlight=False)
    rows = micro_gpt2_tokens(4096, seed=1)
    made = decompose(model, list(SITES), SPD(), rows, steps, batch_size=8, seed=seed, run_dir=out, resume=False)
    quality = measure_quality(model, made, micro_gpt2_tokens(32, seed=2))
    for table in quality_tables(quality):
        console.print(table)
    write_quality(out / "quality.json", made, quality)
    generator = torch.Generator().manual_seed(seed)
    for task in TASKS:
        console.print()
        _ask(console, model, made, micro_gpt2_prompts(task, 1, seed=seed)[0], generator)
    saved = out / "decomposition"
    console.print(f"\nDone in {time.perf_counter() - begun:.0f} s. Saved to [bold]{saved}[/]; open it on any host:")
    console.print("  import tl_paramdecomp as tlpd", highlight=False)
    console.print(f'  dec = tlpd.Decomposition.load("{saved}")', highlight=False)
    console.print('  model = tlpd.load_micro_gpt2("transformer_bridge")', highlight=False)


def _ask(console: "Console", model: Any, made: Decomposition, prompt: TaskPrompt, generator: torch.Generator) -> None:
    """One prompt's next token: as it is, without the component that matters most, and without a random one."""
    from rich.table import Table

    tokens = prompt.tokens.unsqueeze(0)
    effects = sweep(model, made, tokens, answer_log_prob(prompt.answers), progress=False)
    top = max(effects.rows(), key=lambda row: row.effect)
    drawn = int(torch.randint(made[top.site].n_components, (1,), generator=generator))
    probs = {"model": next_token_probs(model, tokens)}
    for label, component in ((f"without {top.component}", top.component), (f"without {drawn} (random)", drawn)):
        with patched(model, made, made.masks().ablate(top.site, [component])):
            probs[label] = next_token_probs(model, tokens)
    words = prompt.text.split()
    text = prompt.text if len(words) <= 20 else f"… {' '.join(words[-18:])}"
    console.print(f"[bold]{TASKS[prompt.task]}[/]\n[italic]{text} …[/]", highlight=False)
    console.print(f"What matters most: component {top.component} of {top.site}.", highlight=False)
    right = "right answer" if len(prompt.answers) == 1 else f"any of {len(prompt.answers)} right answers"
    table, tokenizer = Table("", *probs), micro_gpt2_tokenizer()
    table.add_row(right, *(f"{p[list(prompt.answers)].sum().item():6.1%}" for p in probs.values()), style="bold")
    ranked = zip(*(top_tokens(p, tokenizer, 3) for p in probs.values()))
    for label, row in zip(("likeliest", "second", "third"), ranked):
        table.add_row(label, *(f"{p:6.1%} {token.strip()}" for token, p in row))
    console.print(table)
