"""Train micro-gpt2, the language model that the project ships, and measure what it can do.

    python examples/train_micro_gpt2.py --seed 0 1 2 --steps 4000 --out runs/micro-gpt2

trains one model per seed (a few minutes each on one CPU thread), measures every one on the validation prompts, chooses
the seed whose smallest margin over the wanted figures is largest, and only then measures that one on the test prompts.
`--ship` also puts the chosen model into the package and the figures into docs/results/micro_gpt2.json.

The same seed, machine and versions give the same weights bit for bit. Other processors may not, which is why the
weights are shipped with their hash and not rebuilt.
"""

import argparse
import datetime
import hashlib
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from jaxtyping import Float, Int
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tl_paramdecomp.pretrained import TaskPrompt, micro_gpt2_prompts
from tl_paramdecomp.pretrained.grammar import (
    END_OF_TEXT,
    N_CTX,
    NAMES,
    TOKEN_IDS,
    VOCABULARY,
    YEARS,
    Document,
    rows,
    unframed_prompts,
)
from tl_paramdecomp.pretrained.micro_gpt2 import MICRO_GPT2_DIR, as_task_prompt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "micro_gpt2.json"
BATCH_SIZE, LEARNING_RATE, WARM_UP = 24, 4e-3, 100
N_PROMPTS = 1000
# The least that each figure must reach.
WANTED = {
    "ioi_above_subject": 0.95,
    "ioi_first_of_names": 0.95,
    "ioi_abba": 0.95,
    "ioi_baba": 0.95,
    "pronoun": 0.98,
    "greater_than_mass": 0.95,
    "induction": 0.90,
}


# training --------------------------------------------------------------------------------------------------------


def new_model(seed: int) -> GPT2LMHeadModel:
    """Return an untrained micro-gpt2."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=N_CTX,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_inner=256,
        # One fused operation; equal to gelu_new up to rounding, which is what the saved configuration names.
        activation_function="gelu_pytorch_tanh",
        # The usual 0.02 leaves so narrow a model near zero for too long: induction and IOI then come late or never.
        initializer_range=0.08,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,  # the mark begins every row, and transformers would take it for padding
    )
    return GPT2LMHeadModel(config)


def years_after() -> Float[Tensor, "101 vocab"]:
    """Return the grammar's distribution of the last year, one row per first year; the last row is unused.

    Training on the distribution, not on one year drawn from it, takes the noise out of the slowest figure.
    """
    table = torch.zeros(101, len(VOCABULARY))
    for first in range(99):
        table[first, [TOKEN_IDS[year] for year in YEARS[first + 1 :]]] = 1 / (99 - first)
    return table


def batches(
    seed: int,
) -> Iterator[tuple[Int[Tensor, "batch pos"], Float[Tensor, "batch pos"], Int[Tensor, "batch pos"]]]:
    """Yield token ids, weights of predicting them and, for answers to greater-than, the year to exceed (else -1)."""
    stream = rows(seed)
    while True:
        made: list[Document] = list(islice(stream, BATCH_SIZE))
        ids = torch.tensor([[TOKEN_IDS[word] for word in row.words] for row in made])
        yield ids, torch.tensor([row.weights for row in made]), torch.tensor([row.floors for row in made])


def batch_loss(
    logits: Float[Tensor, "batch pos vocab"],
    ids: Int[Tensor, "batch pos"],
    weights: Float[Tensor, "batch pos"],
    floors: Int[Tensor, "batch pos"],
    later: Float[Tensor, "101 vocab"],
) -> Float[Tensor, ""]:
    """Return the weighted mean cross-entropy of the next words, with a soft target where a later year is asked for."""
    log_probs = logits[:, :-1].log_softmax(-1)
    ids, weights, floors = ids[:, 1:], weights[:, 1:], floors[:, 1:]
    losses = -log_probs.gather(-1, ids[..., None])[..., 0]
    is_year = floors >= 0
    losses = losses.masked_scatter(is_year, -(log_probs[is_year] * later[floors[is_year]]).sum(-1))
    return (weights * losses).sum() / weights.sum()


def train(seed: int, steps: int) -> GPT2LMHeadModel:
    """Return a trained model: AdamW, a short warm-up, then a cosine down to 2 %."""
    model = new_model(seed)
    later = years_after()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    model.train()
    progress = tqdm(islice(batches(seed), steps), total=steps, desc=f"seed {seed}", mininterval=2.0)
    for step, (ids, weights, floors) in enumerate(progress):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * (0.02 + 0.98 * cosine)
        loss = batch_loss(model(ids, use_cache=False).logits, ids, weights, floors, later)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: words, pairs of digits and single marks, in lower case."""
    # No token for unknown words: a prompt with one raises, instead of being answered as if it made sense.
    tokenizer = Tokenizer(models.WordLevel(dict(TOKEN_IDS)))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\d\d|[a-z]+(?:'[a-z]+)?|\S"), behavior="removed", invert=True
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=N_CTX,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer, under the class name that transformers 4 and 5 both know."""
    new_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def save(model: GPT2LMHeadModel, folder: Path) -> str:
    """Write a checkpoint with its tokenizer and return the SHA-256 of its weights."""
    model.config.activation_function = "gelu_new"
    model.save_pretrained(folder)
    save_tokenizer(folder)
    weights = folder / "model.safetensors"
    # Written for the owner alone, which a package must not pass on.
    weights.chmod(0o644)
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def load(folder: Path) -> GPT2LMHeadModel:
    """Return a saved model with eager attention, which can report its patterns."""
    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()


# what it can do --------------------------------------------------------------------------------------------------


def padded(prompts: Iterable[Int[Tensor, " length"]]) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, " batch"]]:
    """Return prompts padded on the right, where a causal model does not look, and the position of each last token."""
    prompts = list(prompts)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    return nn.utils.rnn.pad_sequence(prompts, batch_first=True), last


@torch.no_grad()
def last_logits(model: GPT2LMHeadModel, prompts: list[TaskPrompt]) -> Float[Tensor, "batch vocab"]:
    """Return the logits after each prompt."""
    ids, last = padded(prompt.tokens for prompt in prompts)
    return model(ids).logits[torch.arange(len(ids)), last]


def ioi_figures(model: GPT2LMHeadModel, prompts: list[TaskPrompt]) -> dict[str, float]:
    """Return how often the indirect object is above the subject and first of all names, also by the order of names."""
    logits = last_logits(model, prompts)
    names = torch.tensor([TOKEN_IDS[name] for name in NAMES])
    answer = torch.tensor([prompt.answers[0] for prompt in prompts])
    subject = torch.tensor([prompt.wrong[0] for prompt in prompts])
    rows_ = torch.arange(len(prompts))
    above = logits[rows_, answer] > logits[rows_, subject]
    first = names[logits[:, names].argmax(-1)] == answer
    # ABBA names the indirect object first, BABA the subject.
    abba = torch.tensor([p.tokens.tolist().index(p.answers[0]) < p.tokens.tolist().index(p.wrong[0]) for p in prompts])
    both = above & first
    return {
        "ioi_above_subject": above.float().mean().item(),
        "ioi_first_of_names": first.float().mean().item(),
        "ioi_abba": both[abba].float().mean().item(),
        "ioi_baba": both[~abba].float().mean().item(),
    }


def pronoun_figure(model: GPT2LMHeadModel, prompts: list[TaskPrompt]) -> float:
    """Return how often the right pronoun is the most likely next word of all words."""
    answer = torch.tensor([prompt.answers[0] for prompt in prompts])
    return (last_logits(model, prompts).argmax(-1) == answer).float().mean().item()


def greater_than_masses(model: GPT2LMHeadModel, prompts: list[TaskPrompt]) -> Float[Tensor, " batch"]:
    """Return the probability of all later years together, of the probability of all words."""
    probs = last_logits(model, prompts).softmax(-1)
    return torch.stack([row[list(prompt.answers)].sum() for row, prompt in zip(probs, prompts, strict=True)])


@torch.no_grad()
def induction_figure(model: GPT2LMHeadModel, prompts: list[TaskPrompt]) -> float:
    """Return how often the next word is most likely, over the second copy but for its first word."""
    full = torch.stack([torch.cat([p.tokens, torch.tensor(p.answers)]) for p in prompts])
    start = len(full[0]) // 2 + 1
    guesses = model(full[:, :-1]).logits[:, start:].argmax(-1)
    return (guesses == full[:, start + 1 :]).float().mean().item()


def task_figures(model: GPT2LMHeadModel, split: str, n: int = N_PROMPTS, seed: int = 0) -> dict[str, float]:
    """Return the figures of all tasks on `n` prompts each of a split."""
    masses = greater_than_masses(model, micro_gpt2_prompts("greater_than", n, seed, split))
    return {
        **ioi_figures(model, micro_gpt2_prompts("ioi", n, seed, split)),
        "pronoun": pronoun_figure(model, micro_gpt2_prompts("pronoun", n, seed, split)),
        "greater_than_mass": masses.mean().item(),
        "greater_than_mass_least": masses.min().item(),
        "induction": induction_figure(model, micro_gpt2_prompts("induction", n, seed, split)),
    }


def margin(figures: dict[str, float]) -> float:
    """Return the least share of the gap between wanted and 1 that a figure closes; negative when one falls short."""
    return min((figures[name] - wanted) / (1 - wanted) for name, wanted in WANTED.items())


# how it does it --------------------------------------------------------------------------------------------------

Head = tuple[int, int]


@torch.no_grad()
def attention(model: GPT2LMHeadModel, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "layer batch head query key"]:
    """Return the attention patterns of all heads."""
    return torch.stack(model(ids, output_attentions=True).attentions)


def heads_above(scores: Float[Tensor, "layer head"], least: float) -> dict[Head, float]:
    """Return the heads whose score is above `least`."""
    return {(layer, head): scores[layer, head].item() for layer, head in (scores > least).nonzero().tolist()}


def previous_token_scores(model: GPT2LMHeadModel, prompts: list[TaskPrompt]) -> Float[Tensor, "layer head"]:
    """Return the mean attention of every position to the one before it, on random words."""
    patterns = attention(model, torch.stack([prompt.tokens for prompt in prompts]))
    return patterns.diagonal(-1, dim1=-2, dim2=-1).mean((1, 3))


def induction_scores(model: GPT2LMHeadModel, prompts: list[TaskPrompt]) -> Float[Tensor, "layer head"]:
    """Return the prefix-matching score: the mean attention, in the second copy, to what followed the word before."""
    ids = torch.stack([prompt.tokens for prompt in prompts])
    period = ids.shape[1] // 2
    diagonal = attention(model, ids).diagonal(1 - period, dim1=-2, dim2=-1)
    # The diagonal holds queries from position period - 1 on; the second copy starts at period + 1.
    return diagonal[..., 2:].mean((1, 3))


def scores_from_end(
    model: GPT2LMHeadModel, prompts: list[TaskPrompt], keys: Callable[[TaskPrompt], list[int]]
) -> Float[Tensor, "layer head"]:
    """Return the mean attention from the end of a prompt to some of its positions together."""
    ids, last = padded(prompt.tokens for prompt in prompts)
    batch = torch.arange(len(ids))
    # Indices apart from each other put the batch in front: [batch, layer, head, key].
    patterns = attention(model, ids)[:, batch, :, last]
    kept = [row[..., keys(prompt)].sum(-1) for row, prompt in zip(patterns, prompts, strict=True)]
    return torch.stack(kept).mean(0)


def first_mentions(prompt: TaskPrompt) -> list[int]:
    """Return where an IOI prompt first has the indirect object and the subject."""
    tokens = prompt.tokens.tolist()
    return [tokens.index(prompt.answers[0]), tokens.index(prompt.wrong[0])]


def after_subject(prompt: TaskPrompt) -> list[int]:
    """Return the second mention of the subject and the two words that follow it."""
    again = len(prompt.tokens) - 1 - prompt.tokens.tolist()[::-1].index(prompt.wrong[0])
    return [again, again + 1, again + 2]


@contextmanager
def mean_ablated(
    model: GPT2LMHeadModel,
    heads: Iterable[Head],
    reference: Int[Tensor, "batch pos"],
    last: Int[Tensor, " batch"] | None = None,
) -> Iterator[None]:
    """Replace the outputs of heads by their mean over a reference batch: everywhere, or at the last positions only."""
    width = model.config.n_embd // model.config.n_head
    layers: dict[int, list[int]] = {}
    for layer, head in heads:
        layers.setdefault(layer, []).extend(range(head * width, (head + 1) * width))
    projections = {layer: model.transformer.h[layer].attn.c_proj for layer in layers}
    seen: dict[int, Tensor] = {}
    spies = [
        projection.register_forward_pre_hook(lambda _, args, layer=layer: seen.update({layer: args[0]}))
        for layer, projection in projections.items()
    ]
    with torch.no_grad():
        model(reference)
    for spy in spies:
        spy.remove()

    def replaced(layer: int, z: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor]:
        z, columns = z.clone(), torch.tensor(layers[layer])
        if last is None:
            z[..., columns] = seen[layer].mean((0, 1))[columns]
        else:
            batch = torch.arange(len(z))
            z[batch[:, None], last[:, None], columns] = seen[layer][batch, last].mean(0)[columns]
        return (z,)

    hooks = [
        projection.register_forward_pre_hook(lambda _, args, layer=layer: replaced(layer, args[0]))
        for layer, projection in projections.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ioi_logits(model: GPT2LMHeadModel, prompts: list[TaskPrompt]) -> dict[str, float]:
    """Return the mean logit of the indirect object over the subject, and over the names that the prompt lacks."""
    logits = last_logits(model, prompts)
    answer, subject = torch.tensor([[*prompt.answers, *prompt.wrong] for prompt in prompts]).T
    names = torch.tensor([TOKEN_IDS[name] for name in NAMES])
    absent = (names != answer[:, None]) & (names != subject[:, None])
    others = (logits[:, names] * absent).sum(-1) / absent.sum(-1)
    batch = torch.arange(len(logits))
    return {
        "over_subject": (logits[batch, answer] - logits[batch, subject]).mean().item(),
        "over_absent_names": (logits[batch, answer] - others).mean().item(),
        "first_of_names": ioi_figures(model, prompts)["ioi_first_of_names"],
    }


def induction_heads(model: GPT2LMHeadModel, split: str, n: int, seed: int) -> dict[str, Any]:
    """Return the heads that look back and those that repeat, and how much induction is left without them."""
    prompts = micro_gpt2_prompts("induction", n, seed, split)
    ids = torch.stack([prompt.tokens for prompt in prompts])
    previous = heads_above(previous_token_scores(model, prompts), 0.5)
    repeating = heads_above(induction_scores(model, prompts), 0.5)
    figures: dict[str, Any] = {
        "previous_token_heads": previous,
        "induction_heads": repeating,
        "accuracy": induction_figure(model, prompts),
    }
    for name, heads in (("previous_token_heads", previous), ("induction_heads", repeating)):
        with mean_ablated(model, heads, ids):
            figures[f"accuracy_without_{name}"] = induction_figure(model, prompts)
    return figures


def ioi_heads(model: GPT2LMHeadModel, split: str, n: int, seed: int) -> dict[str, Any]:
    """Return the heads behind IOI, and its logits without them.

    Name heads copy both names, whoever gives, and lift them over all other names. Subject heads read what follows the
    second mention of the subject and push the subject down. Other heads of the name heads' layer step in for them, so
    that layer is also ablated as a whole.
    """
    prompts = micro_gpt2_prompts("ioi", n, seed, split)
    corrupted, last = padded(prompt.corrupted for prompt in prompts)
    readers = heads_above(scores_from_end(model, prompts, first_mentions), 0.9)
    subject = heads_above(scores_from_end(model, prompts, after_subject), 0.5)
    # Only heads behind the name heads can act on what these have written.
    subject = {
        head: score for head, score in subject.items() if head[0] > max((layer for layer, _ in readers), default=0)
    }
    layers = {(layer, head) for layer, _ in readers for head in range(model.config.n_head)}
    figures: dict[str, Any] = {"name_heads": readers, "subject_heads": subject, "logits": ioi_logits(model, prompts)}
    for name, heads in (("name_heads", readers), ("name_head_layer", layers), ("subject_heads", subject)):
        with mean_ablated(model, heads, corrupted, last):
            figures[f"logits_without_{name}"] = ioi_logits(model, prompts)
    return figures


def head_figures(model: GPT2LMHeadModel, split: str, n: int = 300, seed: int = 0) -> dict[str, Any]:
    """Return which heads do induction and IOI, and what is left of the tasks without them."""
    return {"induction": induction_heads(model, split, n, seed), "ioi": ioi_heads(model, split, n, seed)}


# the command -----------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return figures as JSON has them: rounded numbers, and heads named layer.head."""
    if isinstance(value, dict):
        return {f"{key[0]}.{key[1]}" if isinstance(key, tuple) else key: plain(inner) for key, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def train_and_measure(seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train one seed, save it and return its figures on validation prompts; a finished seed is not trained again."""
    finished = folder / "figures.json"
    if finished.exists():
        record = json.loads(finished.read_text())
        if record["steps"] == steps:
            print(f"seed {seed} was trained before: {finished}")
            return record
    start = time.perf_counter()
    model = train(seed, steps)
    seconds = time.perf_counter() - start
    digest = save(model, folder)
    validation = task_figures(load(folder), "validation")
    record = {
        "seed": seed,
        "steps": steps,
        "sha256": digest,
        "seconds": round(seconds, 1),
        "validation": plain(validation),
        "margin": round(margin(validation), 4),
    }
    text = json.dumps(record, indent=2)
    finished.write_text(text + "\n")
    print(text)
    return record


def final_figures(folder: Path) -> dict[str, Any]:
    """Return what the chosen model does on the test prompts, and with which heads."""
    model = load(folder)
    unframed = [as_task_prompt(prompt) for prompt in unframed_prompts(N_PROMPTS)]
    return {
        "test": plain(task_figures(model, "test")),
        "test_names_outside_ioi_frames": plain(ioi_figures(model, unframed)),
        "heads": plain(head_figures(model, "test")),
    }


def main() -> None:
    """Train the seeds, choose by validation, measure the chosen one on the test prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("runs/micro-gpt2"))
    parser.add_argument(
        "--ship", action="store_true", help="put the chosen model into the package and write its figures"
    )
    options = parser.parse_args()
    # More threads sum in another order, and the weights would depend on how many there are.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    folders = {seed: options.out / f"seed-{seed}" for seed in options.seed}
    records = [train_and_measure(seed, options.steps, folder) for seed, folder in folders.items()]
    chosen = max(records, key=lambda record: record["margin"])
    folder = folders[chosen["seed"]]
    weights = folder / "model.safetensors"
    report = {
        "command": f"python examples/train_micro_gpt2.py {' '.join(sys.argv[1:])}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, one thread",
        "parameters": sum(p.numel() for p in load(folder).parameters()),
        "steps": options.steps,
        "prompts_per_task": N_PROMPTS,
        "wanted": WANTED,
        "seeds": records,
        "chosen_seed": chosen["seed"],
        **final_figures(folder),
        "weights_bytes": weights.stat().st_size,
        "weights_sha256": chosen["sha256"],
    }
    text = json.dumps(report, indent=2) + "\n"
    (options.out / "micro_gpt2.json").write_text(text)
    print(text)
    if options.ship:
        shutil.copytree(folder, MICRO_GPT2_DIR, dirs_exist_ok=True, ignore=shutil.ignore_patterns("figures.json"))
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
