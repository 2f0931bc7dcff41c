"""Time and peak memory of one evaluation in a process of its own; prints them as JSON."""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tl_paramdecomp as tlpd
from tests.benchmarks.peak_memory import resident
from tl_paramdecomp.analysis.evaluation import evaluate as room

ROWS, LENGTH = 64, 64

if __name__ == "__main__":
    assets, kinds = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(2)
    room.KINDS = room.KINDS[:kinds]
    name = str(assets / "models" / "stories260K")
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    text = (assets / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")
    rows = torch.stack(list(tlpd.TextRows([text], AutoTokenizer.from_pretrained(name), LENGTH))[:ROWS])
    made = tlpd.decompose(model, "blocks.*.mlp.*", tlpd.SPD(), rows, steps=0, progress=False)
    before, begun = resident(), time.perf_counter()
    found = tlpd.evaluate(model, made, rows, protocol=tlpd.EvaluationConfig(ladder=(1, 4, 20)), progress=False)
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "grown": resident() - before, "peak": resident(), "tokens": found.positions}))
