"""What a measurement is told as: one JSON, a table for people, another system's figures beside it; and the files that
it is given. Nothing here imports torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from alignkit.data.corpus import Prompt
from alignkit.data.files import read_rows, resolve
from alignkit.errors import UserError

COMPARED = {  # figures that two systems' files are compared by, as ours / theirs -> whether less is better
    "seconds_per_update": True,
    "cpu_seconds_per_update": True,
    "generation_seconds": True,
    "sequences_per_second": False,
    "tokens_per_second": False,
    "peak_bytes": True,
}
NEEDED = ("system", "seconds_per_update")  # of the other's file


@dataclass(frozen=True)
class Update:
    """One update of PPO or step of a trainer, of all ranks together. cpu: seconds of all threads of a rank, which say
    more than the clock where others work on the machine; phases: seconds of its parts; training: FLOPs;
    decoding: FLOPs and bytes of the rollout, None for a trainer; padding: share of the computed tokens, if known; peak:
    bytes of a rank so far."""

    seconds: float
    cpu: float
    phases: dict[str, float]
    sequences: int
    tokens: int
    training: float
    decoding: tuple[float, float] | None
    padding: float | None
    peak: int


def read_prompts(path: str | list[str] | None) -> list[Prompt]:
    """The texts in rows {"prompt": TEXT}. Raises UserError with file and line."""
    if path is None:
        raise UserError(
            'bench.prompts: missing; alignkit bench measures PPO on the prompts of a file with rows {"prompt": TEXT}, '
            "for example bench.prompts=prompts.jsonl"
        )
    prompts: list[Prompt] = []
    for file in resolve(path, "bench.prompts"):
        for row in read_rows(file):
            text = row.content.get("prompt") if isinstance(row.content, dict) else None
            if not isinstance(text, str):
                got = row.fault or "a row without one"
                raise UserError(f'{file}:{row.line}: expected a row {{"prompt": TEXT}}, got {got}')
            prompts.append(text)
    return prompts


def read_against(path: str | None) -> dict[str, Any] | None:
    """Another system's figures, None where there are none to be had. Raises UserError."""
    if path is None:
        return None
    (file,) = resolve(path, "bench.against")[:1]
    try:
        found = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"bench.against={path}: expected a JSON file, got a fault ({error})") from None
    lacking = [key for key in NEEDED if not isinstance(found, dict) or key not in found]
    if lacking:
        raise UserError(
            f"bench.against={path}: expected the JSON that recipes/bench/trl_ppo.py or alignkit bench writes, got one "
            f"without {' and '.join(lacking)}"
        )
    wrong = [key for key in COMPARED if key in found and not _is_number(found[key])]
    if wrong:
        raise UserError(f"bench.against={path}: expected a number above 0 for {wrong[0]}, got {found[wrong[0]]!r}")
    return found


def figures_of(updates: Sequence[Update], limits: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Medians over the updates, and all that they are medians of. limits: FLOPs and bytes per second that all ranks
    together could do at the time of each update."""
    seconds = median(u.seconds for u in updates)
    phases = middle([u.phases for u in updates])
    paddings = [u.padding for u in updates if u.padding is not None]
    flops_limits, bytes_limits = zip(*limits)
    trained = [u.training / u.phases.get("update", u.seconds) for u in updates]
    found: dict[str, Any] = {
        "seconds_per_update": seconds,
        "all_seconds": [u.seconds for u in updates],
        "cpu_seconds_per_update": median(u.cpu for u in updates),
        "seconds": phases,
        "sequences_per_second": updates[0].sequences / seconds,
        "tokens_per_second": median(u.tokens / u.seconds for u in updates),
        "non_pad_tokens_per_update": sum(u.tokens for u in updates) / len(updates),
        "padding_fraction": median(paddings) if paddings else None,
        "peak_bytes": max(u.peak for u in updates),
        "training": against_limit("flops", "arithmetic", trained, flops_limits),
    }
    if decoded := [(u.decoding, u.phases["rollout"]) for u in updates if u.decoding is not None]:
        flops, read = ([work[i] / took for work, took in decoded] for i in (0, 1))
        parts = against_limit("flops", "arithmetic", flops, flops_limits)
        parts |= against_limit("bytes", "bandwidth", read, bytes_limits)
        shares = {name: parts[f"share_of_{name}_limit"] for name in ("bandwidth", "arithmetic")}
        found["decoding"] = {**parts, "nearer_limit": max(shares, key=lambda name: shares[name])}
        found["generation_seconds"] = phases["rollout"]
    return {**found, "updates": [asdict(u) for u in updates]}


def against_limit(what: str, limit: str, rates: Sequence[float], limits: Sequence[float]) -> dict[str, float]:
    """Medians of the rates, of the limits, and of each update's share of the limit at its time."""
    return {
        f"{what}_per_second": median(rates),
        f"limit_{what}_per_second": median(limits),
        f"share_of_{limit}_limit": median(rate / most for rate, most in zip(rates, limits)),
    }


def ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Ours / theirs of each figure that both have."""
    shared = [key for key in COMPARED if _is_number(ours.get(key)) and _is_number(theirs.get(key))]
    return {key: ours[key] / theirs[key] for key in shared}


def middle(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of every key that all rows have."""
    shared = [key for key in rows[0] if all(key in row for row in rows)] if rows else []
    return {key: median(row[key] for row in rows) for key in shared}


def table(report: Mapping[str, Any]) -> str:
    """The report for a terminal: medians, and of the seconds also the least and the most."""
    seconds, one = report["all_seconds"], "update" if report["stage"] == "ppo" else "step"
    count = f"{len(seconds)} {one}{'s' * (len(seconds) != 1)}"
    span = f"({min(seconds):.3g} to {max(seconds):.3g})"
    rows = [(f"seconds an {one}" if one == "update" else "seconds a step", f"{report['seconds_per_update']:.3g}", span)]
    rows += [(f"  {phase}", f"{value:.3g}", "") for phase, value in report["seconds"].items()]
    rows.append(("sequences a second", f"{report['sequences_per_second']:.3g}", ""))
    rows.append(("CPU seconds of a rank", f"{report['cpu_seconds_per_update']:.3g}", "of all its threads"))
    note = f"({report['non_pad_tokens_per_update']:.0f} an {one}, prompts and responses)"
    rows.append(("tokens a second", f"{report['tokens_per_second']:.4g}", note.replace("an step", "a step")))
    if report["padding_fraction"] is not None:
        rows.append(("padding", f"{report['padding_fraction']:.3f}", "of the tokens that are computed in training"))
    rows.append(("peak memory", f"{report['peak_bytes'] / 2**30:.3g} GiB", _peak_note(report)))
    rows += [_limit_row("update" if one == "update" else "training", report["training"], "arithmetic", "flops", "FLOP")]
    if decoding := report.get("decoding"):
        nearer = f"({decoding['nearer_limit']} is the nearer limit)"
        for limit, key, unit in (("bandwidth", "bytes", "B"), ("arithmetic", "flops", "FLOP")):
            row = _limit_row("decoding", decoding, limit, key, unit)
            rows.append((*row[:2], f"{row[2]} {nearer}" if limit == decoding["nearer_limit"] else row[2]))
    lines = [f"bench: {report['stage']} on {_machine(report)}; medians of {count} after one that warms up"]
    lines += _aligned(rows)
    if against := report.get("against"):
        lines += ["", f"bench: against {against['system']}, ours / theirs", *_aligned(_against_rows(report, against))]
    return "\n".join(lines)


def _peak_note(report: Mapping[str, Any]) -> str:
    if "model_bytes" not in report:
        return "of a rank"
    return f"of a rank, {report['model_bytes'] / 2**30:.3g} of it weights, gradients and Adam's moments"


def _limit_row(what: str, found: Mapping[str, float], limit: str, key: str, unit: str) -> tuple[str, str, str]:
    rate, most = _scaled(found[f"{key}_per_second"], unit), _scaled(found[f"limit_{key}_per_second"], unit)
    return f"{what}, share of {limit}", f"{found[f'share_of_{limit}_limit']:.3f}", f"{rate} of {most}"


def _against_rows(report: Mapping[str, Any], against: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for key, ratio in against["ratios"].items():
        better = "better" if (ratio < 1) == COMPARED[key] else "worse"
        note = f"{report[key]:.4g} / {against['figures'][key]:.4g}"
        rows.append((key.replace("_", " "), f"{ratio:.3f}", note if ratio == 1 else f"{note}, {better}"))
    return rows


def _aligned(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    wide = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return [f"  {name:<{wide[0]}}  {value:>{wide[1]}}  {note}".rstrip() for name, value, note in rows]


def _machine(report: Mapping[str, Any]) -> str:
    machine = report["hardware"]
    ranks = f"{machine['ranks']} rank{'s' * (machine['ranks'] != 1)}"
    threads = "" if machine["gpu"] else f" of {machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    return f"{machine['gpu'] or machine['cpu']}, {ranks}{threads}, {report['settings']['compute_dtype']}"


def _scaled(value: float, unit: str) -> str:
    """1.5e12 -> "1.5 TFLOP/s"."""
    power = min(max(int(math.log10(value)) // 3, 0), 5) if value > 0 else 0
    return f"{value / 1000**power:.3g} {' KMGTP'[power].strip()}{unit}/s"


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
