"""A version loaded in a process of its own and asked for a few tokens, which must be those of plain decoding.

Of a version whose target only a serving engine holds, files, ends and draft are loaded, and nothing can be asked.

    python -P deepspec/tracking/fresh.py models:/NAME/VERSION FOLDER

It is run by its path and imports nothing of `deepspec` before the version is loaded: what is tried is the package that
is stored with the version. FOLDER takes the downloaded files.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROMPT = "What is 12 times 7?"
TOKENS = 16


def ask(uri: str, folder: str) -> None:
    """Load the version in float32 and compare its greedy tokens with those of its target alone.

    Raises:
        Exception: whatever loading raises; RuntimeError: the tokens are others, and no tie of two logits explains it.
    """
    import mlflow
    import pandas as pd

    model = mlflow.pyfunc.load_model(uri, dst_path=folder, model_config={"dtype": "float32"})
    served = model.unwrap_python_model()
    if (
        served.deployment is None
    ):  # measured in an engine, which alone can hold the target: its ends and the draft load
        return

    from deepspec import generate
    from deepspec.evaluation.identity import check_identity

    prompt = served.target.chat_ids([{"role": "user", "content": PROMPT}])
    (plain,) = generate(served.target, None, prompt, max_new_tokens=TOKENS)
    expected = served.target.tokenizer.decode(plain.tokens, skip_special_tokens=True)
    answers = model.predict(pd.DataFrame({"prompt": [PROMPT]}), params={"max_new_tokens": TOKENS})
    if answers["text"][0] == expected:
        return
    drafter, tree = served.deployment.drafter, served.deployment.tree
    found = check_identity(served.target, drafter, served.target.source, [plain], TOKENS, tree)
    if not found.lossless or not found.ties:
        raise RuntimeError(f"it writes {answers['text'][0]!r}, but its target alone {expected!r}")


def main() -> None:
    uri, folder = sys.argv[1:]
    try:
        ask(uri, folder)
        import deepspec

        if not Path(deepspec.__file__).resolve().is_relative_to(Path(folder).resolve()):
            raise RuntimeError("it does not bring its own code: deepspec comes from this machine")
    except Exception as error:
        said = " ".join(str(error).split())
        ours = type(error).__name__ in ("DeepSpecError", "RuntimeError", "MlflowException")
        raise SystemExit(f"error: {said if ours and said else f'{type(error).__name__}: {said}'}") from None


if __name__ == "__main__":
    main()
