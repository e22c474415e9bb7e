"""A folder for the Hugging Face Hub: the weights file and a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fastalex._version import __version__
from fastalex.common.files import replacing

_SHOWN = 20  # classes that a card names


def write_hub_folder(folder: Path, weights: Path, metadata: dict[str, Any]) -> None:
    """Write ``folder``/model.safetensors and README.md, which ``hf upload`` takes as they are.

    Args:
        folder: which is made where it is not there.
        weights: a weights file; its copy keeps all metadata, so that ``fastalex.load`` reads it.
        metadata: of that file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "model.safetensors") as temporary:
        shutil.copyfile(weights, temporary)
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(model_card(metadata), encoding="utf-8")


def model_card(metadata: dict[str, Any]) -> str:
    """The text of a README.md: what the Hub reads, and what a person does.

    Args:
        metadata: of a weights file.
    """
    variant, classes, size = (metadata[name] for name in ("variant", "classes", "image_size"))
    about: dict[str, Any] = {
        "library_name": "fastalex",
        "pipeline_tag": "image-classification",
        "tags": ["alexnet", "image-classification"],
    }
    lines = [
        f"# AlexNet ({variant})",
        "",
        f"The AlexNet of 2012, variant `{variant}`, for images of {size} pixels a side and "
        f"{len(classes)} classes. Written by fastalex {__version__}.",
        "",
        "```python",
        "import fastalex",
        "from huggingface_hub import hf_hub_download",
        "from PIL import Image",
        "",
        'model = fastalex.load(hf_hub_download("USER/NAME", "model.safetensors"))',
        'logits = model(model.transforms(Image.open("photo.jpg"))[None])',
        "print(model.classes[logits.argmax()])",
        "```",
        "",
    ]
    if metadata.get("top1") is not None:
        lines += [
            "| validation images, centre crop | |",
            "|---|---|",
            f"| top-1 | {metadata['top1']:.1%} |",
            f"| top-5 | {metadata['top5']:.1%} |",
            "",
            f"Trained for {metadata['epoch']} epochs ({metadata['step']} steps) in "
            f"{metadata['precision']}, seed {metadata['seed']}.",
            "",
        ]
    more = f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    lines.append(f"Classes: {', '.join(classes[:_SHOWN])}{more}.")
    # JSON is YAML, and quotes whatever a name may hold.
    head = [f"{name}: {json.dumps(value)}" for name, value in about.items()]
    return "\n".join(["---", *head, "---", "", *lines, ""])
