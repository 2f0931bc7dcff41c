"""Small language models with rows to train on and rows to measure on, shared by the examples that measure methods."""

import datetime
import os
import sys
from pathlib import Path

import torch

import tl_paramdecomp as tlpd
from tl_paramdecomp.methods.from_factors import versions

SITES, LENGTH, BATCH = "blocks.*.mlp.*", 64, 4


def written_rows(model, n: int, length: int, seed: int) -> torch.Tensor:
    """Rows [n, length] sampled from a transformers model at temperature 1, each beginning with its first token."""
    torch.manual_seed(seed)
    begin = torch.full((n, 1), model.config.bos_token_id)
    with torch.no_grad():
        return torch.cat(
            [
                model.generate(
                    rows, max_new_tokens=length - 1, min_new_tokens=length - 1, do_sample=True, top_k=0, pad_token_id=0
                )
                for rows in begin.split(1024)
            ]
        )


def open_model(name: str, text: Path | None, held_out: int = 64):
    """A model, rows to train on, and held-out rows."""
    if name == "micro-gpt2":
        return (
            tlpd.load_micro_gpt2("transformers"),
            tlpd.micro_gpt2_tokens(8192, seed=1),
            tlpd.micro_gpt2_tokens(held_out, seed=2),
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name).eval()
    if text is None:
        sys.exit("Give --text FILE with text that the model never saw, to measure on.")
    rows = tlpd.TextRows([text.read_text(encoding="utf-8")], AutoTokenizer.from_pretrained(name), LENGTH)
    return model, written_rows(model, 8192, LENGTH, seed=0), torch.stack(list(rows)[:held_out])


def record() -> dict:
    """Command, date and versions, as results are kept with."""
    command, assets = f"python {' '.join(sys.argv)}", os.environ.get("TLPD_TEST_ASSETS")
    return {
        "command": command.replace(assets, "$TLPD_TEST_ASSETS") if assets else command,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }
