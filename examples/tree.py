"""Sample with a tree of drafted tokens, a verification rule and a controller of your own choice.

python -m examples.tree --target data/target --draft data/drafts/dspark
"""

from __future__ import annotations

from deepspec import generate, load_drafter, load_target
from deepspec.decoding.request import Generation
from deepspec.decoding.scheduler import Threshold
from deepspec.decoding.shapes import Sampled
from examples.options import parse, run


def main(arguments: list[str] | None = None) -> dict[str, Generation]:
    """Print what each way of drafting commits per pass of the target, and return the answers by its name.

    At temperature 1 the answers differ, since other random numbers are drawn; their law is the same, the target's.
    """
    options = parse(arguments, draft=True)
    target = load_target(options.target)
    drafter = load_drafter(options.draft, target)
    prompt = target.chat_ids([{"role": "user", "content": options.prompt}])

    # Four children at the first position, two at the second, one at the third; at most 16 nodes are verified.
    tree = Sampled(branching=[4, 2, 1], budget=16)
    ways = {
        "chain, block verification": {},
        "tree, traversal": {"tree": tree},
        "tree, recursive rejection": {"tree": tree, "verify": "recursive"},
        "tree, cut where confidence falls below 0.2": {"tree": tree, "controller": Threshold(least=0.2)},
    }
    answers = {}
    for name, way in ways.items():
        (out,) = generate(
            target, drafter, prompt, max_new_tokens=options.tokens, temperature=1.0, seed=0, **way
        )
        verified = sum(out.stats.verified) / len(out.stats.verified)
        print(f"{name:44}τ {out.stats.tau:.2f}, {verified:.1f} drafted tokens verified a round")
        answers[name] = out
    return answers


if __name__ == "__main__":
    run(main)
