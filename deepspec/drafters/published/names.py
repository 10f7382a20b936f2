"""Names of weights in foreign files, brought to ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deepspec.target.weights import Stored

PREFIXES = ("module.", "draft_model.", "model.")
# The target's own, kept by some trainers, and buffers that follow from the configuration.
NEVER_READ = ("verifier_lm_head.weight", "verifier_norm.weight")
NEVER_READ_ENDS = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq")


@dataclass(frozen=True)
class Names:
    """Names in the files → plain names (`layers.0.…`), and those that are left out."""

    plain: dict[str, str]
    left_out: tuple[str, ...]

    def weights(self, stored: Mapping[str, Stored]) -> dict[str, Stored]:
        """Return what is stored, by plain name."""
        return {plain: stored[name] for name, plain in self.plain.items()}

    def below(self, prefix: str, stored: Mapping[str, Stored]) -> dict[str, Stored]:
        """Return what is stored below a prefix, by the names below it."""
        weights = self.weights(stored)
        return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def plain_names(stored: Iterable[str]) -> Names:
    """Return the names without wrappers' prefixes, with `layers.0.` for the `midlayer.` of EAGLE-3."""
    plain, left_out = {}, []
    for name in stored:
        if name in NEVER_READ or name.endswith(NEVER_READ_ENDS):
            left_out.append(name)
            continue
        bare = name
        for prefix in PREFIXES:
            bare = bare.removeprefix(prefix)
        if bare.startswith("midlayer."):
            bare = "layers.0." + bare.removeprefix("midlayer.")
        plain[name] = bare
    return Names(plain, tuple(left_out))
