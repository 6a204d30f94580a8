"""Networks small enough to train in a test, with every kind of layer in them."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "lenet5": {},
    "alexnet": {"width": 0.125, "dropout": 0.0, "image_size": 64},
    "vgg": {"width": 0.125, "depth": 11, "dropout": 0.0, "image_size": 32},
    "googlenet": {"width": 0.25, "image_size": 32},
    "inception_v3": {"width": 0.125, "image_size": 32},
    "resnet": {"width": 0.25, "image_size": 32},
    "inception_resnet": {"width": 0.125, "repeats": (1, 1, 1), "image_size": 32},
    "xception": {"width": 0.125, "repeats": 1, "image_size": 32},
    "mobilenet": {"width": 0.25, "image_size": 32},
}

# Autoencoders, an odd side among them.
SMALL_CODES: list[tuple[str, dict[str, Any]]] = [
    ("autoencoder", {"features": 4, "hidden": [], "code": 2}),
    ("autoencoder", {"image_size": 17, "channels": [4, 8, 8], "hidden": [], "code_activation": "sigmoid"}),
    ("vae", {"features": 4, "latent": 3}),
    ("vae", {"image_size": 16, "channels": [4, 8]}),
]


# The Transformers' sizes: of the encoder's, of the decoder's, of both together.
TRANSFORMER: dict[str, Any] = {"layers": 2, "heads": 2, "width": 16}
