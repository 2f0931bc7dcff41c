"""Write docs/results.md from the JSON that runs left in docs/results/: `python docs/make_results.py`.

A test holds the page and the files together, so no figure on it is typed in.
"""

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from tl_paramdecomp.analysis.evaluation.comparison import SHARES, Comparison, spread
from tl_paramdecomp.analysis.evaluation.result import Evaluation
from tl_paramdecomp.experiments.recipes import RECIPES

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from rendering import Row, origin, table  # noqa: E402
from results_circuits import circuits  # noqa: E402
from results_l3d import digits, language_model, subnetworks, sweeps, tasks  # noqa: E402
from results_training import endurance, memory  # noqa: E402

RESULTS, PAGE, BELIEVE = HERE / "results", HERE / "results.md", HERE / "how_much_to_believe.md"
MARKS = "<!-- controls: written by make_results.py -->", "<!-- end -->"


def decomposition(record: Mapping[str, Any]) -> str:
    """A run of the `decompose` or `demo` command."""
    kls = table(("masks", "KL, nats per token"), [(kind, f"{kl:.4f}") for kind, kl in record["kl"].items()])
    sites = [(name, f"{record['l0'][name]:.1f}", record["alive"][name], c) for name, c in record["components"].items()]
    total = (
        "all",
        f"{sum(record['l0'].values()):.1f}",
        sum(record["alive"].values()),
        sum(record["components"].values()),
    )
    counts = table(("site", "L0 per token", "active anywhere", "components"), [*sites, total])
    settings = record["settings"]
    run = f"Seed {settings['seed']}, {settings['steps']} steps of {settings['batch_size']} rows."
    return f"{origin(record)} {run}\n\n{kls}\n\n{counts}"


def micro_gpt2(record: Mapping[str, Any]) -> str:
    """Figures of the embedded model by seed, and those of the shipped weights on the test prompts."""
    names = list(record["test"])
    rows = [(f"seed {s['seed']}, validation", *(s["validation"][n] for n in names)) for s in record["seeds"]]
    rows.append((f"**seed {record['chosen_seed']}, test**", *(f"**{record['test'][n]}**" for n in names)))
    rows.append(("wanted", *(record.get("wanted", {}).get(n, "") for n in names)))
    figures = table(("prompts", *(n.replace("_", " ") for n in names)), rows)
    heads = table(("heads", "figure"), _flat(record["heads"]))
    text = "Seeds are chosen on the validation prompts; the test prompts are evaluated for the chosen one."
    return f"{origin(record)}\n\n{text}\n\n{figures}\n\nHeads of the shipped weights, on test prompts:\n\n{heads}"


def benchmarks(record: Mapping[str, Any]) -> str:
    """Ratios of CPU time or memory, each measured against its neighbour in one run."""
    rows = []
    for r in record["ratios"]:
        floor = r.get("floor_ms")
        over = "" if not floor else f"{r['slow_ms'] / floor:.2f} x {floor:.0f} ms"
        rows.append((r["what"], f"{r['ratio']:.2f}", f"{r['slow_ms']:.1f}", f"{r['fast_ms']:.1f}", over))
    figures = table(("what", "ratio", "ms", "against ms", "the floor"), rows)
    return f"{origin(record)} {record['machine']}.\n\n{figures}"


def reproduced(record: Mapping[str, Any]) -> str:
    """A published toy result: a row for each seed, and the published figures."""
    for seed in record["seeds"]:
        seed["alive"] = seed.get("alive_in_all", seed["alive"])
    sites = list(record["seeds"][0]["alive"])
    by_layer = list(record["seeds"][0].get("identity_ci_error_by_layer", ()))
    keys = [key for key in ("mmcs", "ml2r", "identity_ci_error", "dense_ci_error") if key in record["seeds"][0]]
    columns = (
        "seed",
        *(KEYS[key] for key in keys),
        *(f"identity CI error, {layer}" for layer in by_layer),
        *(f"alive, {site}" for site in sites),
        "L0",
        "steps",
        "targets tried",
    )
    rows = []
    for seed in record["seeds"]:
        figures = [f"{seed[key]:.4f}" if isinstance(seed[key], float) else seed[key] for key in keys]
        l0 = " / ".join(f"{value:.2f}" for value in seed["l0"].values())
        alive = [seed["alive"][site] for site in sites]
        figures += [seed["identity_ci_error_by_layer"][layer] for layer in by_layer]
        rows.append((seed["seed"], *figures, *alive, l0, record["settings"]["steps"], seed["targets_tried"]))
    expected = record["expected"]
    published = {**expected.get("alive", {}), **expected.get("alive_in_all", {})}
    wanted = [expected.get(key, "") for key in keys]
    rows.append(
        (
            "published",
            *wanted,
            *("" for _ in by_layer),
            *(published.get(site, "") for site in sites),
            "",
            "",
            "",
        )
    )
    recipe, settings = RECIPES[record["name"]], record["settings"]
    short = ""
    if settings["steps"] < recipe.steps or settings["batch_size"] < recipe.batch_size:
        short = f" Shortened: the recipe has {recipe.steps} steps of {recipe.batch_size} rows; this was run on a CPU."
    parts = [f"{origin(record)} {record['machine']}.{short}", table(columns, rows)]
    if "scrubbed" in record["seeds"][0]:
        parts += [SCRUBBED, table(("seed", *SCRUBBED_KEYS.values()), [scrubbed(seed) for seed in record["seeds"]])]
    return "\n\n".join(parts)


SCRUBBED = (
    "Components of the input matrices removed, half of them at random for each row: all but the active features' own "
    "(scrubbed), or those among them (anti-scrubbed). Mean square distance from the labels, in thousandths; and what goes of "
    "a feature's own gain when its component does, or another feature's."
)
SCRUBBED_KEYS = {
    "target": "target",
    "scrubbed": "scrubbed",
    "anti_scrubbed": "anti-scrubbed",
    "own_only": "own components alone",
    "none": "no component",
    "own_share": "gone with its own",
    "others_share": "gone with another's",
}


def scrubbed(seed: Mapping[str, Any]) -> Row:
    """The scrubbed errors of one seed."""
    shares = ("own_share", "others_share")
    figures = seed["scrubbed"]
    return (
        seed["seed"],
        *(f"{figures[k]:.2%}" if k in shares else f"{1e3 * figures[k]:.4f}" for k in SCRUBBED_KEYS),
    )


KEYS = {"mmcs": "MMCS", "ml2r": "ML2R", "identity_ci_error": "identity CI error", "dense_ci_error": "dense CI error"}


def curves(record: Mapping[str, Any]) -> str:
    """Runs of several methods on one model: where each ended, and the picture of the way there."""
    columns = (
        "method",
        "seed",
        "steps",
        "L0",
        "of",
        "unmasked",
        "rounded",
        "stochastic",
        "PGD, median",
        "PGD, worst",
        "zero",
    )
    rows = []
    for run in record["runs"]:
        last = run["points"][-1]
        kls = (f"{last[key]:.4f}" for key in ("unmasked", "rounded", "stochastic", "pgd", "pgd_worst", "zero"))
        rows.append((run["method"], run["seed"], last["step"], f"{last['l0']:.1f}", run["components"], *kls))
    worst = max(point["unmasked"] for run in record["runs"] for point in run["points"])
    text = f"KL in nats per token; {record['rows']}. Over all of training the unmasked KL was at most {worst:.4f}."
    drawn = f"curves_{record['model']}.png"
    picture = (
        f"\n\n![curves over training](results/{drawn})" if len({run["method"] for run in record["runs"]}) > 1 else ""
    )
    return f"{origin(record)} {text}\n\n{table(columns, rows)}{picture}"


def compared(record: Mapping[str, Any]) -> str:
    """Methods where they are equally sparse: medians over seeds and ranges, and the curves."""
    found = comparison_of(record)
    protocol = record["protocol"]
    seeds, factors = (", ".join(f"{value:g}" for value in protocol[key]) for key in ("seeds", "sparsities"))
    text = (
        f"{protocol['steps']} steps of {protocol['batch_size']} rows, seeds {seeds}, factors {factors} on each method's "
        f"importance coefficient. KL in nats per token on held-out rows; all components removed: "
        f"{record['points'][0]['zero']:.2f}. An empty cell: no curve reaches there."
    )
    parts = [f"{origin(record)} {text}"]
    for metric in found.measured:
        shared = found.shared_range()
        columns = [f"L0 {share * found.ranks:.0f} (1/{round(1 / share)} of {found.ranks})" for share in SHARES]
        columns += [f"mean, L0 {shared[0]:.0f} to {shared[1]:.0f}"] if shared else []
        sides = [found.at(share, metric) for share in SHARES] + ([found.areas(metric)] if shared else [])
        rows = [(method, *(spread(side[method]) for side in sides)) for method in found.methods]
        parts.append(f"{MASKS[metric]}:\n\n{table(('method', *columns), rows)}")
    matched = [
        (
            f"{row['method']}, {row['sparsity']:g}",
            *(f"{row[side][key]:.3f}" for side in ("trained", "untrained") for key in ("read", "write", "rank_one")),
        )
        for row in record["stability"]
        if row["method"] in ("SPD", "VPD")
    ]
    columns = ("method, factor", "V", "U", "rank one", "starts: V", "U", "rank one")
    parts.append(f"Matched cosines of active components between seeds:\n\n{table(columns, matched)}")
    parts.append(f"![curves against sparsity](results/compare_{record['model']}.png)")
    return "\n\n".join(parts)


def runs(record: Mapping[str, Any]) -> str:
    """A comparison of few runs, run by run."""
    keys = ("l0", "rounded", "stochastic", "adversarial", "adversarial_worst")
    rows = [
        (p["method"], f"{p['sparsity']:g}", p["seed"], f"{p['l0']:.1f}", *(f"{p[key]:.3f}" for key in keys[1:]))
        for p in record["points"]
    ]
    columns = ("method", "factor", "seed", "L0", "rounded", "stochastic", "PGD, median", "PGD, worst")
    return f"{origin(record)} {record['protocol']['steps']} steps.\n\n{table(columns, rows)}"


MASKS = {
    "rounded": "Only components with importance above 0.1",
    "stochastic": "Stochastic masks",
    "adversarial": "20-step adversary, median of its restarts",
}


def evaluated(record: Mapping[str, Any]) -> str:
    """The headline of an evaluation, its adversary by steps, and whether importance predicts effects."""
    found = Evaluation(**record["evaluation"])
    keys = ("l0", "rounded", "adversarial")
    heads = [
        (name, *(f"{values[key]:.3f}" for key in keys))
        for name, values in {"this one": found.headline, **found.controls}.items()
    ]
    steps = [(row["steps"], *(f"{row[key]:.3f}" for key in ("kl", "kl_worst", "start"))) for row in found.adversary]
    predicts = [
        (what, *("" if row[key] is None else f"{row[key]:.3f}" for key in ("auroc", "spearman")))
        for what, row in found.specificity.items()
    ]
    parts = [
        f"{origin(record)} {found.positions} tokens, {found.seconds:.0f} s.",
        table(("decomposition", "L0", "rounded KL", "adversarial KL"), heads),
        table(("adversary's steps", "KL, median", "worst", "random start"), steps),
        "Does importance predict what ablating one component does?",
        table(("importances", "AUROC", "Spearman"), predicts),
    ]
    return "\n\n".join(parts)


def controls() -> str:
    """What the controls gave, for the page on how much to believe."""
    rows = [row for model in ("micro-gpt2", "stories260K") for row in compared_controls(model)]
    columns = ("control", "where", "real", "control", "all removed")
    return table(columns, [*rows, *demo_controls()])


def compared_controls(model: str) -> list[Row]:
    """Permuted importances, a random basis and shuffled weights, from comparisons."""
    record = read(f"compare_{model}")
    if record is None:
        return []
    found, zero = comparison_of(record), record["points"][0]["zero"]
    sparsities = sorted(record["protocol"]["sparsities"])
    runs = [p for p in record["points"] if (p["method"], p["sparsity"]) == ("SPD", sparsities[len(sparsities) // 2])]
    l0, real, dealt = (statistics.median(p[key] for p in runs) for key in ("l0", "rounded", "permuted"))
    rows: list[Row] = [control(f"{model}: importances dealt anew", l0, real, dealt, zero)]
    at, l0 = found.at(1 / 8, "rounded"), found.ranks / 8
    if at.get("SPD") and at.get("random"):
        spd, basis = (statistics.median(at[method]) for method in ("SPD", "random"))
        rows.append(control(f"{model}: a random basis", l0, spd, basis, zero))
    shuffled = read(f"compare_{model}-shuffled")
    theirs = None if shuffled is None else comparison_of(shuffled).at(1 / 8, "rounded").get("SPD")
    if shuffled is not None and theirs and at.get("SPD"):
        shares = statistics.median(at["SPD"]) / zero, statistics.median(theirs) / shuffled["points"][0]["zero"]
        what = f"{model}: weights shuffled (shares of what all removed costs)"
        rows.append((what, f"L0 {l0:.0f}", *(f"{share:.1%}" for share in shares), "100%"))
    return rows


def demo_controls() -> list[Row]:
    """Permuted importances and the untrained start of the demo."""
    record = read("evaluate_demo")
    if record is None:
        return []
    found = Evaluation(**record["evaluation"])
    start, head, zero = found.controls["untrained"], found.headline, found.mask_row("zero")["kl"]
    dealt = found.mask_row("permuted 0.1")["kl"]
    return [
        control("demo: importances dealt anew", head["l0"], head["rounded"], dealt, zero),
        control(f"demo: untrained, at L0 {start['l0']:.0f}", head["l0"], head["rounded"], start["rounded"], zero),
    ]


def control(what: str, l0: float, *kls: float) -> Row:
    """A row of the table of controls."""
    return (what, f"L0 {l0:.0f}", *(f"{kl:.2f}" for kl in kls))


def read(name: str) -> Any:
    """A record, or None where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def comparison_of(record: Mapping[str, Any]) -> Comparison:
    """The comparison in a record, without what stands around it."""
    return Comparison(**{field.name: record[field.name] for field in fields(Comparison)})


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[Row]:
    rows: list[Row] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        rows += _flat(value, f"{name}: ") if isinstance(value, Mapping) else [(name, value)]
    return rows


TOYS = (
    ("tms-5-2", "TMS, 5 features in 2 dimensions"),
    ("tms-5-2-id", "TMS, 5 features in 2 dimensions, with an identity between"),
    ("tms-40-10", "TMS, 40 features in 10 dimensions"),
    ("tms-40-10-id", "TMS, 40 features in 10 dimensions, with an identity between"),
    ("resid-mlp-1", "ResidMLP, 1 layer"),
    ("resid-mlp-2", "ResidMLP, 2 layers"),
    ("resid-mlp-3", "ResidMLP, 3 layers"),
    ("induction", "The two-layer induction toy"),
)

L3D_TOYS = (
    ("l3d-tms", "TMS, 5 features in 2 dimensions"),
    ("l3d-circuits", "superposed circuits, 10 inputs through 5 neurons"),
    ("l3d-high-rank", "6 groups of 5 inputs through 10 neurons"),
    ("l3d-squared", "five squares through four layers"),
)

SECTIONS = (
    ("micro_gpt2", "micro-gpt2, the embedded model", micro_gpt2),
    ("curves_micro-gpt2", "SPD and VPD on all MLP matrices of micro-gpt2", curves),
    ("curves_stories260K", "SPD and VPD on all MLP matrices of stories260K (Llama, 260k parameters)", curves),
    ("one_step_stories260K", "SPD on stories260K against an adversary of one full step, as it was before", curves),
    ("compare_micro-gpt2", "Methods at equal sparsity: all MLP matrices of micro-gpt2", compared),
    ("compare_stories260K", "Methods at equal sparsity: all MLP matrices of stories260K", compared),
    ("budget_vpd", "Six times the budget on micro-gpt2: VPD", runs),
    ("budget_whitened", "Six times the budget on micro-gpt2: whitened singular directions", runs),
    ("compare_micro-gpt2-shuffled", "The control: the same on micro-gpt2 with its weights shuffled", compared),
    ("spd_stories260k", "SPD on all MLP matrices of stories260K, 1,000 steps", decomposition),
    *((f"reproduce_{name}", f"Published toys: {title}", reproduced) for name, title in TOYS),
    ("demo", "The demo", decomposition),
    ("evaluate_demo", "The demo's decomposition evaluated, with controls", evaluated),
    *((f"reproduce_{name}", f"L3D's toys: {title}", subnetworks) for name, title in L3D_TOYS),
    ("reproduce_l3d-digits", "L3D on a convolutional network that reads digits", digits),
    ("l3d_sweeps", "L3D's toys: more subnetworks, other ranks", sweeps),
    ("l3d_micro-gpt2", "L3D on micro-gpt2", language_model),
    ("l3d_babyllama-tok105", "L3D on babyllama-tok105 (Llama, 936k parameters, characters)", language_model),
    ("l3d_tasks", "L3D subnetworks that serve one task of micro-gpt2", tasks),
    ("circuits_micro-gpt2", "Circuits of micro-gpt2's four tasks", circuits),
    ("circuits_gpt-nano-sort", "Circuits of gpt-nano-sort, which sorts six digits", circuits),
    ("circuits_babyllama-tok105", "Circuits of babyllama-tok105, which goes on with names it has read", circuits),
    ("benchmarks", "What patching costs", benchmarks),
    ("benchmarks_step", "What a training step costs, against the textbook step", benchmarks),
    ("benchmarks_evaluate", "What an evaluation costs", benchmarks),
    ("benchmarks_l3d", "What a step of L3D costs, against the dense form", benchmarks),
    ("endurance", "Memory over a long run with streaming data, stories260K", endurance),
    ("run_memory", "Memory of a run, foretold and measured", memory),
    ("benchmarks_causal", "What attribution and sweeps cost, against plain forward passes", benchmarks),
)


def page() -> str:
    """The whole page."""
    made = "Every figure the project claims, written by `python docs/make_results.py` from `docs/results/*.json`."
    parts = ["# Results", made]
    for name, title, render in SECTIONS:
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts += [f"## {title}", render(json.loads(path.read_text(encoding="utf-8")))]
    return "\n\n".join(parts) + "\n"


def believing() -> str:
    """The page on how much to believe, with the controls' figures between its two marks."""
    before, _, rest = BELIEVE.read_text(encoding="utf-8").partition(MARKS[0])
    return f"{before}{MARKS[0]}\n{controls()}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    BELIEVE.write_text(believing(), encoding="utf-8")
