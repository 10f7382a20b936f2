"""Decode one prompt plainly and with a draft: the same tokens in fewer passes of the target.

python -m examples.generate --target data/target --draft data/drafts/dspark
"""

from __future__ import annotations

from deepspec import generate, load_drafter, load_target
from examples.options import parse, run


def main(arguments: list[str] | None = None) -> tuple[list[int], list[int]]:
    """Print both answers' figures and return their tokens."""
    options = parse(arguments, draft=True)
    target = load_target(options.target, dtype="float32")  # in bfloat16 near-ties may fall either way
    drafter = load_drafter(options.draft, target)
    prompt = target.chat_ids([{"role": "user", "content": options.prompt}])

    (plain,) = generate(target, None, prompt, max_new_tokens=options.tokens)
    (drafted,) = generate(target, drafter, prompt, max_new_tokens=options.tokens)

    print(target.tokenizer.decode(drafted.tokens))
    for name, out in (("plain", plain), ("drafted", drafted)):
        seconds = out.stats.draft_s + out.stats.verify_s + out.stats.host_s
        print(
            f"{name:8}{len(out.tokens)} tokens, τ {out.stats.tau:.2f}, {len(out.tokens) / seconds:.1f} tokens/s"
        )
    print("the same tokens:", plain.tokens == drafted.tokens)
    return plain.tokens, drafted.tokens


if __name__ == "__main__":
    run(main)
