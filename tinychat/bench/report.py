"""What `tinychat bench` found, in words and bars, a line for each matter. Knows only plain data."""

from __future__ import annotations

from typing import Any

from tinychat.memory import megabytes

BAR = 32  # characters of the longest


def report(result: dict[str, Any]) -> str:
    """One run, as `measure.measure` gives it."""
    rows = [*_speeds(result), *_memory(result), *_bandwidth(result)]
    lines = [_title(result), *(f"  {left:<15}{right}" for left, right in rows)]
    if result.get("contexts"):
        lines += ["", *_contexts(result["contexts"])]
    return "\n".join(lines)


def _title(r: dict[str, Any]) -> str:
    level = f" ({r['isa']})" if r["isa"] else ""
    threads = f", {r['threads']} thread{'s' if r['threads'] > 1 else ''}" if r["threads"] else ""
    return (
        f"{r['model']}: {r['weights']}, {r['n_parameters'] / 1e9:.3g} B parameters\n"
        f"{r['backend']}{level}{threads} · {r['activations']}-bit activations · {r['head']}-bit head · "
        f"{r['kv_dtype']} KV cache · {r['machine']} · {r['date']}"
    )


def _speeds(r: dict[str, Any]) -> list[tuple[str, str]]:
    made = ", in which its weights were drawn too" if r["weights"].startswith("random") else ""
    rows = [("load", f"{r['load_s']:.2f} s{made}")]
    for name in sorted((n for n in r if n[:2] in ("pp", "tg") and n[2:].isdigit()), key=lambda n: (n[:2], -int(n[2:]))):
        rows.append((name, f"{_rate(r[name]['median'])} tokens/s{_range(r[name])}"))
    first = f"{1000 * r['time_to_first_token_s']:.3g} ms after a prompt of {r['decode_prompt']}"
    for name, value in r.items():
        if name.startswith("time_to_first_token_") and (length := name.split("_")[-2]).isdigit():
            first += f", {value:.3g} s after one of {length}"
    rows.append(("first token", first))
    decode = f"{_rate(r['decode_tokens_per_second'])} tokens/s{_range(r['decode_spread'])}"
    rows.append(("decode", f"{decode}, median of {r['decode_tokens']} tokens after a prompt of {r['decode_prompt']}"))
    overhead = f"{100 * r['overhead_fraction']:.1f} % of a token passes outside the model's step"
    if r["outside_kernels_fraction"] is not None:
        overhead += f", {100 * r['outside_kernels_fraction']:.1f} % outside its kernels"
    rows.append(("overhead", overhead))
    return rows


def _memory(r: dict[str, Any]) -> list[tuple[str, str]]:
    peak = "unknown" if r["peak_rss_bytes"] is None else megabytes(r["peak_rss_bytes"])
    if r.get("peak_device_bytes"):
        peak = f"{megabytes(r['peak_device_bytes'])} on the GPU, {peak} beside it,"
    bits = r["resident_bits_per_weight"]
    each = "" if bits is None else f", {bits:.2f} bits a quantized weight"
    table = f", embedding {megabytes(r['embedding_bytes'])}" if r["embedding_bytes"] else ""
    weights = f"weights {megabytes(r['resident_bytes'])}{each}{table}"
    return [("memory", f"peak {peak} at a context of {r['ctx_size']}; {weights}")]


def _bandwidth(r: dict[str, Any]) -> list[tuple[str, str]]:
    ahead = {
        "far": "asked for far ahead",
        "near": "asked for shortly ahead",
        "none": "not asked for ahead",
        "two": "not asked for ahead, in two streams",
    }
    reads = f"{megabytes(r['bytes_per_token'])} a token: {r['decode_gb_s']:.1f} GB/s"
    rows = [("reads", reads)]
    if r["bandwidth_fraction"] is not None:
        spread = r["bandwidth_fraction_spread"]
        rows[0] = (
            "reads",
            f"{reads}, {r['bandwidth_fraction']:.2f} of the probe ({spread['low']:.2f} .. {spread['high']:.2f})",
        )
        low, high = r["probe_quartiles"]
        verdict = "valid" if r["probe_valid"] else "INVALID"
        rows.append(
            (
                "read probe",
                f"{r['probe_gb_s']:.1f} GB/s (half of it in {low:.1f} .. {high:.1f}), "
                f"{megabytes(r['probe_bytes'])} between the tokens: {verdict}",
            )
        )
    rows += [("", f"no valid probe: {reason}") for reason in r["probe_reasons"]]
    by_way: dict[str, list[str]] = {}
    for linear, way in (r.get("fetch") or {}).items():
        by_way.setdefault(way, []).append(linear)
    if by_way:
        rows.append(("weights are", "; ".join(f"{ahead[way]} ({', '.join(of)})" for way, of in by_way.items())))
    if r["fits_cache"]:
        cache = megabytes(r["cache_bytes"])
        rows.append(
            ("", f"a cache of {cache} may hold it, or much of it: such a fraction says little about the memory")
        )
    return rows


def _contexts(contexts: list[dict[str, Any]]) -> list[str]:
    longest = max(c["tokens_per_second"] for c in contexts)
    lines = [f"  {'context':>7}  {'tokens/s':>9}  {'':<{BAR}}  {'of the probe':>12}  {'its KV alone':>12}"]
    for c in contexts:
        bar = "█" * max(1, round(BAR * c["tokens_per_second"] / longest))
        fractions = "".join(f"  {_or_dash(c[name]):>12}" for name in ("bandwidth_fraction", "kv_bandwidth_fraction"))
        lines.append(f"  {c['context']:>7}  {_rate(c['tokens_per_second']):>9}  {bar:<{BAR}}{fractions}".rstrip())
    return lines


def _range(spread: dict[str, float]) -> str:
    return f" ({_rate(spread['low'])} .. {_rate(spread['high'])})"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
