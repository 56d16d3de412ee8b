"""What the paper found, what was found here, and whether the two agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.upcycling.model import mean
from benchmarks.upcycling.report import Numbers

LEAST = 0.5
"""Points that a difference must reach on average, with the same sign for every seed, to count."""

RULES = {"v0": "v0", "v1": "v1", "adaptive": "adaptive decay"}
NAMES = {
    "average": "average",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare": "DARE",
    "experts": "experts",
}
METHODS = [method for method in NAMES if method != "experts"]
KINDS = {"full": "Full fine-tuning"}


@dataclass(frozen=True)
class Finding:
    """One result of the paper.

    Args:
        where: the figure or table.
        paper: what it shows there.
        ours: what came out here.
        verdict: `reproduced`, `partly` or `not`.
    """

    where: str
    paper: str
    ours: str
    verdict: str


def verdict(claims: Sequence[bool]) -> str:
    """Of a result's claims: all, some or none of them hold."""
    return "reproduced" if all(claims) else "partly" if any(claims) else "not"


def holds(differences: Numbers, least: float = LEAST) -> bool:
    """Whether a difference is large enough, and has the same sign for every seed."""
    return mean(differences) >= least and min(differences) > 0


def minus(first: Numbers, second: Numbers) -> Numbers:
    """Seed by seed."""
    return [a - b for a, b in zip(first, second, strict=True)]


def peak(curve: dict[str, Any], method: str) -> str:
    """The step that validation prefers, over all seeds."""
    return max(curve, key=lambda step: mean(curve[step]["validation"][method]))


def loss_after_peak(curve: dict[str, Any], method: str) -> tuple[str, Numbers]:
    """The preferred step, and what the merge of the longest trained experts has lost since then."""
    best, last = peak(curve, method), list(curve)[-1]
    return best, minus(curve[best][method], curve[last][method])


def oracle(curve: dict[str, Any], method: str) -> Numbers:
    """The best score of any step, by the test examples themselves."""
    return [max(each) for each in zip(*(at[method] for at in curve.values()), strict=True)]


def findings(record: dict[str, Any]) -> list[dict[str, str]]:
    """All that the record has the figures for."""
    found = (_figure_1, _figure_3, _figure_4, _figure_9, _tables_1_2, _table_3, _table_5, _appendix_h)
    return [asdict(finding) for section in found for finding in section(record)]


def _figure_1(record: dict[str, Any]) -> Iterator[Finding]:
    study = record["study"]
    lora = f"lora{study['rank']}"
    papers = {
        "full": (
            "Fig. 1, left",
            "merges of fully fine-tuned experts peak at 256 of 2048 steps; 3 points are lost then",
        ),
        lora: (
            "Fig. 1, centre",
            "merges of LoRA experts peak at 128 steps; TIES loses 17 points then, the most",
        ),
    }
    for kind, (where, paper) in papers.items():
        if curve := record.get(f"merges/{kind}"):
            lost = {method: loss_after_peak(curve, method) for method in METHODS}
            claims = [holds(difference) for _, difference in lost.values()]
            if kind == lora:
                claims.append(max(lost, key=lambda m: mean(lost[m][1])) == "ties")
            ours = "; ".join(
                f"{NAMES[m]} peaks at {step}, then {-mean(d):+.1f}" for m, (step, d) in lost.items()
            )
            experts = minus(*(list(curve.values())[i]["experts"] for i in (-1, -4)))
            yield Finding(
                where,
                paper,
                f"{ours}; the experts themselves {mean(experts):+.1f} over the last three doublings",
                verdict(claims),
            )
    if found := record.get("moerged"):
        steps = [step for step in found if step.isdigit()]
        best = max(steps, key=lambda step: mean(found[step]["validation"]))
        lost = minus(found[best]["trained"], found[steps[-1]]["trained"])
        yield Finding(
            "Fig. 1, right",
            "MoErged models of overtrained LoRA experts end 2 points lower",
            f"best of experts of {best} steps; of {steps[-1]}: {-mean(lost):+.1f}",
            verdict([best != steps[-1] and holds(lost)]),
        )


def _figure_3(record: dict[str, Any]) -> Iterator[Finding]:
    if not (bins := record.get("bins")):
        return
    last = str(record["study"]["last"])
    lost = {m: [mean(each) for each in steps[last]] for m, steps in bins["forgotten"].items()}
    hard = {m: sum(shares[7:]) for m, shares in lost.items()}
    yield Finding(
        "Fig. 3, left",
        "merging forgets hard examples above all",
        f"of what merges of experts of {last} steps forget, the hardest 30 % are "
        + ", ".join(f"{value:.0f} % ({NAMES[m]})" for m, value in hard.items())
        + f"; the easiest 30 %: {mean([sum(shares[:3]) for shares in lost.values()]):.0f} %",
        verdict([value > 40 for value in hard.values()]),
    )
    near = min(bins["loss"], key=lambda step: abs(int(step) - 100))
    share = {step: bins["loss"][step][-1] for step in (near, last)}
    yield Finding(
        "Fig. 3, right",
        "after 100 steps, the hardest 10 % carry over half the training loss",
        " and ".join(f"{mean(v):.0f} % at {step} steps" for step, v in share.items())
        + f"; highest at {max(bins['loss'], key=lambda s: mean(bins['loss'][s][-1]))} steps: "
        + f"{max(mean(v[-1]) for v in bins['loss'].values()):.0f} %",
        verdict([min(share[near]) > 50, max(mean(v[-1]) for v in bins["loss"].values()) > 25]),
    )


def _figure_4(record: dict[str, Any]) -> Iterator[Finding]:
    all_examples, left_out = record.get("merges/full"), record.get("left_out")
    if not all_examples or not left_out:
        return
    texts, claims = [], []
    count = len(next(iter(next(iter(left_out.values())).values()))["experts"])
    for share, curve in left_out.items():
        step = list(curve)[-1]
        cost = {
            what: minus(all_examples[step][what][:count], curve[step][what])
            for what in ("task_arithmetic", "average", "experts")
        }
        claims.append(holds(cost["task_arithmetic"]))
        texts.append(
            f"without {100 * float(share):.0f} %: "
            + ", ".join(f"{NAMES[what]} {-mean(d):+.1f}" for what, d in cost.items())
        )
    yield Finding(
        "Fig. 4",
        "leaving hard examples out hurts the merge",
        f"at {step} steps, {'; '.join(texts)}",
        verdict(claims),
    )


def _figure_9(record: dict[str, Any]) -> Iterator[Finding]:
    curves = {rank: record.get(f"merges/lora{rank}") for rank in sorted(record["study"]["ranks"])}
    if len(curves) < 2 or not all(curves.values()):
        return
    lost = {
        method: {rank: loss_after_peak(curve, method)[1] for rank, curve in curves.items() if curve}
        for method in ("task_arithmetic", "ties")
    }
    first, last = min(curves), max(curves)
    count = min(len(d) for ranks in lost.values() for d in ranks.values())
    claims = [holds(minus(ranks[first][:count], ranks[last][:count])) for ranks in lost.values()]
    ours = "; ".join(
        f"{NAMES[method]} loses " + ", ".join(f"{mean(d):.1f} (rank {rank})" for rank, d in ranks.items())
        for method, ranks in lost.items()
    )
    yield Finding("Fig. 9", "a higher LoRA rank loses less by overtraining", ours, verdict(claims))


def _tables_1_2(record: dict[str, Any]) -> Iterator[Finding]:
    kinds = {"full": ("Tab. 1", "full fine-tuning"), f"lora{record['study']['rank']}": ("Tab. 2", "LoRA")}
    for kind, (where, what) in kinds.items():
        stopped, curve = record.get(f"stopped/{kind}"), record.get(f"merges/{kind}")
        if not stopped or not curve:
            continue
        claims, texts = [], []
        last = list(curve)[-1]
        count = len(stopped["v0"]["average"])
        for rule, name in RULES.items():
            gains = [minus(stopped[rule][m], curve[last][m][:count]) for m in METHODS]
            short = [minus(stopped[rule][m], oracle(curve, m)[:count]) for m in METHODS]
            claims += [holds(gain) for gain in gains]
            claims.append(mean([mean(each) for each in short]) > -LEAST)
            texts.append(
                f"{name} {mean([mean(g) for g in gains]):+.1f} ({mean([mean(s) for s in short]):+.1f})"
            )
        yield Finding(
            where,
            f"{what}: early stopping recovers the best merge, or a better one",
            "against the longest training, and (in brackets) the best step by test, "
            f"the mean of four methods: {', '.join(texts)}",
            verdict(claims),
        )


def _table_3(record: dict[str, Any]) -> Iterator[Finding]:
    if not (found := record.get("moerged")):
        return
    steps = [step for step in found if step.isdigit()]
    best = [max(each) for each in zip(*(found[step]["trained"] for step in steps), strict=True)]
    claims, texts = [], []
    for rule, name in RULES.items():
        gain = minus(found[rule]["trained"], found[steps[-1]]["trained"])
        short = minus(found[rule]["trained"], best)
        claims += [holds(gain), mean(short) > -LEAST]
        texts.append(f"{name} {mean(gain):+.1f} ({mean(short):+.1f})")
    yield Finding(
        "Tab. 3",
        "MoErging: early stopping recovers the best model, or a better one",
        f"against the longest training, and (in brackets) the best step by test: {', '.join(texts)}",
        verdict(claims),
    )


def _table_5(record: dict[str, Any]) -> Iterator[Finding]:
    papers = {
        "sign_conflict": ("sign conflict", "7.2 → 8.0 %", "{:.1f}", " %"),
        "overlap": ("overlap", "26 → 29.5 %", "{:.1f}", " %"),
        "magnitude_ratio": ("magnitude ratio", "1.03 → 1.48", "{:.2f}", ""),
        "variance": ("variance", "1.35e-10 → 8.15e-8", "{:.1e}", ""),
    }
    if not (found := record.get("interference")):
        return
    first, *_, last = found
    for measure, (name, paper, form, unit) in papers.items():
        start, end = found[first][measure], found[last][measure]
        ours = f"{form.format(mean(start))} → {form.format(mean(end))}{unit} from {first} to {last} steps"
        yield Finding(
            "Tab. 5", f"{name} grows with training: {paper}", ours, verdict([holds(minus(end, start), 0)])
        )


def _appendix_h(record: dict[str, Any]) -> Iterator[Finding]:
    if not (bins := record.get("bins")):
        return
    last = record["study"]["last"]
    claims, texts = [], []
    for measure, values in bins["memorised"].items():
        claims.append(holds(minus(values[-1], values[0]), 0))
        texts.append(f"{measure} {mean(values[0]):.2f} → {mean(values[-1]):.2f}")
    yield Finding(
        "App. H",
        "what is memorised late are the hard examples",
        f"from step {last // 8} to {last}, easiest → hardest bin: {', '.join(texts)}",
        verdict(claims),
    )


def stopping(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Each rule's mean step and its experts' and merges' accuracies, for both kinds of fine-tuning.

    `longest` takes the experts of the last step, `best step` for each column the step that is best by the
    test examples themselves, which no rule can know.
    """
    names = {
        **RULES,
        "merged": "`merged/val_acc`, all tasks, as v1",
        "merged_own": "`merged/val_acc`, own task, as v1",
        "merged_v0": "`merged/val_acc`, all tasks, as v0",
    }
    rows = []
    for kind in ("full", f"lora{record['study']['rank']}"):
        stopped, curve = record.get(f"stopped/{kind}"), record.get(f"merges/{kind}")
        if not stopped or not curve:
            continue
        last = list(curve)[-1]
        rows.append(_row(kind, "longest", int(last), {m: curve[last][m] for m in NAMES}))
        rows += [
            _row(kind, name, mean([mean(each) for each in stopped[rule]["steps"]]), stopped[rule])
            for rule, name in names.items()
        ]
        rows.append(_row(kind, "best step", None, {m: oracle(curve, m) for m in NAMES}))
    return rows


def beside_merged(record: dict[str, Any]) -> list[str]:
    """Where stopping by the merge's accuracy stands among the other rules, a sentence per kind."""
    sentences = []
    for kind in ("full", f"lora{record['study']['rank']}"):
        stopped, curve = record.get(f"stopped/{kind}"), record.get(f"merges/{kind}")
        if not stopped or not curve:
            continue
        last = list(curve)[-1]
        others = {
            **{name: {m: stopped[rule][m] for m in METHODS} for rule, name in RULES.items()},
            "the longest training": {m: curve[last][m] for m in METHODS},
            "the best step": {m: oracle(curve, m) for m in METHODS},
        }
        for watched, how in {"merged": "v1", "merged_v0": "v0"}.items():
            texts = []
            for name, scores in others.items():
                ours = stopped[watched]
                each = [minus(ours[m], scores[m][: len(ours[m])]) for m in METHODS]
                by_seed = [mean(seed) for seed in zip(*each, strict=True)]
                span = f" ({min(by_seed):+.1f} to {max(by_seed):+.1f})" if len(by_seed) > 1 else ""
                texts.append(f"{mean(by_seed):+.1f}{span} against {name}")
            sentences.append(f"{KINDS.get(kind, 'LoRA')}, looks as {how}: {', '.join(texts)}.")
    return sentences


def _row(kind: str, rule: str, step: float | None, scores: dict[str, Any]) -> dict[str, Any]:
    means = {method: round(mean(scores[method]), 1) for method in NAMES}
    return {"kind": kind, "rule": rule, "step": None if step is None else round(step), **means}
