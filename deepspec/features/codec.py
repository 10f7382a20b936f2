"""The form that params.yaml asks for, among those in which hidden states are kept (`inside/deepspec_codec.py`)."""

from __future__ import annotations

from deepspec.errors import DeepSpecError, nearest
from deepspec.features.inside.deepspec_codec import CODECS, Codec, Encoded

__all__ = ["CODECS", "Codec", "Encoded", "codec"]


def codec(name: str, width: int | None = None) -> Codec:
    """Return the codec of a name, for states of a width.

    Raises:
        DeepSpecError: no codec of that name, or one that cannot cut such a state into its groups.
    """
    if name not in CODECS:
        raise DeepSpecError(
            f"unknown feature format {name!r}{nearest(name, CODECS)}; known: {', '.join(CODECS)}"
        )
    found = CODECS[name]
    if width and found.group and width % found.group:
        raise DeepSpecError(f"{name} features need a hidden size divisible by {found.group}, found {width}")
    return found
