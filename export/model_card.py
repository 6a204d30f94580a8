"""MODEL_CARD.md: what a model is and where it comes from, for people (Mitchell et al. 2019, "Model Cards")."""

from __future__ import annotations

from export.bundle import Manifest
from export.processing.inputs import ImageInput, LatentInput, SeriesInput, TextInput
from export.reports.evaluation import Evaluation

MOST_LABELS = 50


def card(manifest: Manifest, evaluation: Evaluation | None, licence: str | None) -> str:
    """Markdown. `manifest` may still lack its version and files; `licence` is that of the base model's weights."""
    parts = [f"# {manifest.name}", _summary(manifest), "## Use", _use(manifest)]
    if manifest.labels:
        shown = ", ".join(f"`{label}`" for label in manifest.labels[:MOST_LABELS])
        more = len(manifest.labels) - MOST_LABELS
        parts += ["## Labels", shown + (f" and {more} more (see manifest.json)" if more > 0 else "")]
    if evaluation is not None:
        parts += ["## Evaluation", f"On {evaluation.samples} held-out samples (evaluation.json, evaluation.png):"]
        parts.append(evaluation.words())
    elif manifest.metrics:
        parts += ["## Evaluation", "\n".join(f"- {name}: {value:.4g}" for name, value in manifest.metrics.items())]
    parts += ["## Export", _parity(manifest), "## Lineage", _lineage(manifest, licence)]
    return "\n\n".join(parts) + "\n"


def _summary(manifest: Manifest) -> str:
    what = {
        "classification": f"a classifier with {len(manifest.labels)} labels",
        "embedding": "an encoder",
        "generation": "a generator of images",
    }
    return (
        f"This is {what[manifest.task]}, architecture `{manifest.model['architecture']}`, "
        f"exported on {manifest.created_at:%Y-%m-%d}."
    )


def _use(manifest: Manifest) -> str:
    path = "classify" if manifest.task == "classification" else "embeddings"
    match manifest.input:
        case ImageInput(height=height, width=width, resize=resize):
            words = f"Images of any size; they are brought to {width} x {height} pixels ({resize})."
            call = (
                f"curl 'http://127.0.0.1:8000/v1/{path}?model={manifest.name}' "
                "-H 'content-type: image/png' --data-binary @image.png"
            )
            if manifest.task == "embedding":
                call = _json_call(path, manifest.name, '"data:image/png;base64,..."')
        case TextInput(max_length=max_length):
            words = f"Texts; what is longer than {max_length} tokens is cut."
            call = _json_call(path, manifest.name, '"some text"')
        case LatentInput(size=size, images=images):
            words = f"Images of {images.width} x {images.height} pixels are made from {size} standard normal numbers."
            call = (
                "curl http://127.0.0.1:8000/v1/images/generations -H 'content-type: application/json' "
                f'-d \'{{"model": "{manifest.name}", "n": 4, "seed": 1}}\''
            )
        case SeriesInput(channels=channels, max_length=max_length):
            words = f"Series of at most {max_length:,} steps, {channels} number{'s' * (channels > 1)} each."
            call = _json_call(path, manifest.name, "[0.0, ...]" if channels == 1 else "[[0.0, ...], ...]")
        case _:
            words = (
                f"Vectors of {manifest.input.features} numbers: {', '.join(manifest.input.names[:20]) or 'unnamed'}."
            )
            call = _json_call(path, manifest.name, "[0.0, ...]")
    return f"{words}\n\n    {call}"


def _json_call(path: str, name: str, sample: str) -> str:
    body = f'{{"model": "{name}", "input": {sample}}}'
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
    if lineage.recipe is not None:
        rows.append("- recipe: in manifest.json, under `lineage`")
    rows += [f"- {name} {version}" for name, version in lineage.package_versions.items()]
    return "\n".join(rows)
