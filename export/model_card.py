"""MODEL_CARD.md: what a model is and where it comes from, for people (Mitchell et al. 2019, "Model Cards")."""

from __future__ import annotations

from export.bundle import Generation, Interval, Manifest
from export.processing.inputs import ImageInput, LatentInput, SeriesInput, TextInput
from export.reports.evaluation import Evaluation
from export.variants import Report

MOST_LABELS = 50
# Where a model of a task is asked under /v1, if not for its embeddings.
PATHS = {
    "classification": "classify",
    "binary": "classify",
    "multi_label": "classify",
    "regression": "predict",
    "multi_task": "predict",
    "reconstruction": "predict",
}


def card(manifest: Manifest, evaluation: Evaluation | None, licence: str | None, tried: Report | None = None) -> str:
    """Markdown. `manifest` may still lack its version and files; `licence` is that of the base model's weights. tried:
    precisions that the graph was tried in."""
    parts = [f"# {manifest.name}", _summary(manifest), "## Use", _use(manifest)]
    if manifest.labels:
        title = "Numbers" if manifest.task == "regression" else "Labels"
        parts += [f"## {title}", _listed(manifest.labels)]
    if manifest.interval is not None:
        parts.append(_interval(manifest.labels, manifest.interval))
    for name, head in manifest.heads.items():
        parts += [f"## Head `{name}`: {head.task.replace('_', ' ')}", _listed(head.labels)]
        if head.interval is not None:
            parts.append(_interval(head.labels, head.interval))
    if manifest.generation is not None:
        parts += ["## Writing", _writing(manifest, manifest.generation)]
    if evaluation is not None:
        parts += ["## Evaluation", f"On {evaluation.samples} held-out samples (evaluation.json, evaluation.png):"]
        parts.append(evaluation.words())
    elif manifest.metrics and manifest.generation is None:
        parts += ["## Evaluation", "\n".join(f"- {name}: {value:.4g}" for name, value in manifest.metrics.items())]
    parts += ["## Export", _parity(manifest)]
    if tried is not None:
        parts += ["## Precision", _tried(tried)]
    parts += ["## Lineage", _lineage(manifest, licence)]
    return "\n\n".join(parts) + "\n"


def _summary(manifest: Manifest) -> str:
    count = len(manifest.labels)
    what = {
        "classification": f"a classifier with {count} labels",
        "binary": f"a classifier of two labels, {' and '.join(manifest.labels)}",
        "multi_label": f"a classifier that gives any number of {count} labels at once",
        "regression": f"a regression of {count} number{'s' if count > 1 else ''}",
        "multi_task": f"one network with {len(manifest.heads)} heads",
        "reconstruction": "an autoencoder",
        "embedding": "an encoder",
        "generation": "a generator of images",
        "translation": "a translation model",
        "masked_language_model": "an encoder that has learned from texts without labels",
        "language_model": "a language model",
    }
    return (
        f"This is {what[manifest.task]}, architecture `{manifest.model['architecture']}`, "
        f"exported on {manifest.created_at:%Y-%m-%d}."
    )


def _listed(labels: list[str]) -> str:
    more = len(labels) - MOST_LABELS
    shown = ", ".join(f"`{label}`" for label in labels[:MOST_LABELS])
    return shown + (f" and {more} more (see manifest.json)" if more > 0 else "")


def _interval(names: list[str], interval: Interval) -> str:
    share = f"{100 * interval.coverage:g} in 100"
    if interval.method == "gaussian":
        return (
            f"The true number is taken to lie within {interval.margins[0]:.2f} deviations of the answer in {share} "
            "cases: the network learned a deviation for each answer, as of a normal distribution."
        )
    margins = ", ".join(f"`{name}` ± {margin:.4g}" for name, margin in zip(names, interval.margins, strict=True))
    return (
        f"The true number lies in the interval in {share} cases, of items like those of the validation split: "
        f"{margins} (split conformal: what so many of them were missed by at most)."
    )


def _writing(manifest: Manifest, generation: Generation) -> str:
    """What it can be asked, and what its matrices have become."""
    chats = "It chats, by the template in `chat_template.jinja`." if generation.chat_template else "It knows no chats."
    ends = ", ".join(f"`{token}`" for token in generation.end_token_ids)
    words = (
        f"A sequence, what is asked and what is answered, has at most {generation.context:,} tokens; the tokens {ends} "
        f"end it. {chats} Its matrices are kept in {generation.weights}."
    )
    if generation.weights == "float32":
        return words
    rows = ["| weights | perplexity | tokens/s, one sequence | MiB |", "|---|---|---|---|"]
    for kind in ("float32", generation.weights):
        perplexity, speed, size = (
            manifest.metrics[f"{kind}_{what}"] for what in ("perplexity", "tokens_per_second", "bytes")
        )
        rows.append(f"| {kind} | {perplexity:.4g} | {speed:.3g} | {size / 2**20:,.1f} |")
    table = "\n".join(rows)
    return (
        f"{words} On {manifest.metrics['held_out_tokens']:,.0f} held-out tokens, through ONNX Runtime on the machine "
        f"that it was exported on:\n\n{table}\n\nThe weights that training goes on from are float32."
    )


def _tried(report: Report) -> str:
    names, providers = list(report.tried[0].metrics), list(report.tried[0].samples_per_second)
    columns = ["precision", *names, *(f"samples/s, {one}" for one in providers), "MiB", ""]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for one in report.tried:
        cells: list[str] = [one.precision]
        cells += [f"{one.metrics[name]:.4g}" if name in one.metrics else "" for name in names]
        speeds = one.samples_per_second
        cells += [f"{speeds[name]:.3g}" if name in speeds else "" for name in providers]
        serves = [provider for provider, precision in report.serving.items() if precision == one.precision]
        cells += [f"{one.bytes / 2**20:.1f}" if one.bytes else ""]
        cells += [f"not kept: {one.reason}" if not one.kept else f"serves on {' and '.join(serves)}" if serves else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return (
        f"What loses more than {100 * report.most_loss:g} in 100 of a metric on held-out data is not kept. Samples a "
        f"second are those of ONNX Runtime where it was exported, {report.rows} at a time.\n\n" + "\n".join(lines)
    )


def _use(manifest: Manifest) -> str:
    path = PATHS.get(manifest.task, "embeddings")
    match manifest.input:
        case ImageInput(height=height, width=width, resize=resize):
            words = f"Images of any size; they are brought to {width} x {height} pixels ({resize})."
            call = (
                f"curl 'http://127.0.0.1:8000/v1/{path}?model={manifest.name}' "
                "-H 'content-type: image/png' --data-binary @image.png"
            )
            if path == "embeddings":
                call = _json_call(path, manifest.name, '"data:image/png;base64,..."')
        case TextInput(max_length=max_length) if manifest.task == "translation":
            words = f"Texts of at most {max_length} tokens; a longer one is refused."
            call = _json_call("completions", manifest.name, '"some text"', field="prompt")
        case TextInput(max_length=max_length) if manifest.task == "language_model":
            words = f"Texts to go on with, of at most {max_length:,} tokens with what is written."
            call = _json_call("completions", manifest.name, '"some text"', field="prompt")
            if manifest.generation is not None and manifest.generation.chat_template is not None:
                messages = '[{"role": "user", "content": "some text"}]'
                call += f"\n\n    {_json_call('chat/completions', manifest.name, messages, field='messages')}"
        case TextInput(max_length=max_length):
            words = f"Texts; what is longer than {max_length} tokens is cut."
            call = _json_call(path, manifest.name, '"some text"')
        case LatentInput(size=size, images=images):
            words = f"Images of {images.width} x {images.height} pixels are made from {size} standard normal numbers."
            call = _generation_call(manifest.name)
        case SeriesInput(channels=channels, max_length=max_length):
            words = f"Series of at most {max_length:,} steps, {channels} number{'s' * (channels > 1)} each."
            call = _json_call(path, manifest.name, "[0.0, ...]" if channels == 1 else "[[0.0, ...], ...]")
        case _:
            words = (
                f"Vectors of {manifest.input.features} numbers: {', '.join(manifest.input.names[:20]) or 'unnamed'}."
            )
            call = _json_call(path, manifest.name, "[0.0, ...]")
    if manifest.task == "reconstruction":
        call += (
            "\n\nThe answer is the `reconstruction`, the `error` that it misses the input by, which is large for what "
            "is unlike the training data, and the code, `embedding`."
        )
        if "generator" in manifest.graphs and isinstance(manifest.input, ImageInput):
            made = _generation_call(manifest.name)
            call += f" New images are made of standard normal codes, or of given ones:\n\n    {made}"
    return f"{words}\n\n    {call}"


def _generation_call(name: str) -> str:
    return (
        "curl http://127.0.0.1:8000/v1/images/generations -H 'content-type: application/json' "
        f'-d \'{{"model": "{name}", "n": 4, "seed": 1}}\''
    )


def _json_call(path: str, name: str, sample: str, field: str = "input") -> str:
    body = f'{{"model": "{name}", "{field}": {sample}}}'
    return f"curl http://127.0.0.1:8000/v1/{path} -H 'content-type: application/json' -d '{body}'"


def _parity(manifest: Manifest) -> str:
    parity = manifest.parity
    return (
        f"PyTorch and ONNX Runtime were compared on {parity.samples} samples: largest difference "
        f"{parity.largest_difference:.1e} (allowed: {parity.tolerance:.0e}, times the largest value where that is "
        f"above 1), {parity.top1_disagreements} other winners."
    )


def _lineage(manifest: Manifest, licence: str | None) -> str:
    lineage = manifest.lineage
    rows = [f"- base model: `{lineage.base_model}`" + (f" (licence of its weights: {licence})" if licence else "")]
    if lineage.job_id:
        rows.append(f"- job: `{lineage.job_id}`")
    if lineage.training_sha256:
        rows.append(f"- training data: sha256 `{lineage.training_sha256}`")
    if lineage.validation_sha256:
        rows.append(f"- validation data: sha256 `{lineage.validation_sha256}`")
    rows += [f"- unlabelled data of the domain to be answered: sha256 `{one}`" for one in lineage.unlabelled_sha256]
    if lineage.recipe is not None:
        rows.append("- recipe: in manifest.json, under `lineage`")
        if (lineage.recipe.get("transfer") or {}).get("lora"):
            rows.append("- adapter: merged into the weights, and in `adapter/` for peft, onto the base model")
    rows += [f"- {name} {version}" for name, version in lineage.package_versions.items()]
    return "\n".join(rows)
