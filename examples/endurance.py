"""Does a long run keep its memory? Resident memory of a decomposition that streams its data, for as long as is asked.

    python examples/endurance.py MODEL --text FILE --minutes 35

1. All MLP matrices, SPD as it comes; the text is streamed through `datasets`, tokenised and joined while training, over and
   over; a checkpoint every 500 steps, the last two kept.
2. A callback notes the process's resident memory. The slope is that of a least-squares line after the first fifth of the run.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from small_models import record

import tl_paramdecomp as tlpd

WARM = 0.2
"""Share of the run before the slope is taken."""


class Memory:
    """Notes resident memory, in MB, as a figure of every logged step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def __call__(self, info: tlpd.StepInfo) -> None:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        resident = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024
        info.figures["resident_mb"] = resident
        self.seen.append((info.step, resident))

    def slope(self) -> float:
        """MB per 1,000 steps after the warm-up."""
        steps, resident = np.array(self.seen).T
        late = steps > WARM * steps[-1]
        return float(1000.0 * np.polyfit(steps[late], resident[late], 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name of a transformers model")
    parser.add_argument("--text", type=Path, required=True, help="documents parted by blank lines")
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--length", type=int, default=64, help="tokens per row")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/endurance"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(args.model).eval(),
        AutoTokenizer.from_pretrained(args.model),
    )
    data = tlpd.token_batches(args.text, model, tokenizer=tokenizer, length=args.length, separator="\n\n", shuffle=200)
    shutil.rmtree(args.out, ignore_errors=True)
    memory, begun = Memory(), time.perf_counter()
    made = tlpd.decompose(
        model, "blocks.*.mlp.*", tlpd.SPD(), data, 1_000_000, args.batch_size, args.seed, args.out, log_every=20,
        checkpoint_every=500, callbacks=[memory], max_seconds=60 * args.minutes,
    )  # fmt: skip
    steps, resident = memory.seen[-1][0], [mb for _, mb in memory.seen]
    late = [mb for step, mb in memory.seen if step > WARM * steps]
    every = max(1, len(memory.seen) // 40)
    found = {
        "steps": made.info["stopped_after"],
        "minutes": (time.perf_counter() - begun) / 60,
        "slope_mb_per_1000_steps": memory.slope(),
        "first_mb": resident[0],
        "after_warm_up_mb": [min(late), max(late)],
        "last_mb": resident[-1],
        "resident_mb": memory.seen[::every],
        "rows": steps * args.batch_size,
    }
    print(json.dumps({key: value for key, value in found.items() if key != "resident_mb"}, indent=1))
    written = json.dumps({**record(), "settings": made.info["run"], **found}, indent=1)
    (args.out / "endurance.json").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
