"""A server on this machine's loopback, vLLM's or another: started, waited for, and ended with all its processes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

import deepspec.features.inside
from deepspec.errors import DeepSpecError
from deepspec.serving.environment import Environment

LOGS = Path(".deepspec/serve")
INSIDE = Path(deepspec.features.inside.__path__[0])  # modules that vLLM loads
STATES = "extract_hidden_states"  # vLLM's method that writes hidden states
OWN = "DEEPSPEC_SERVER"  # in the environment of a server's processes: the path of its log
STARTER = "DEEPSPEC_SERVER_STARTER"  # as well: the number of the process that started it
MODEL = "target"  # the name it is served under
START_S = 3600  # longest wait for a server, which may have hundreds of gigabytes to read
STOP_S = 20  # after which it is killed
ENDED_S = 2  # in which a server that a client misses is seen to have ended
_METHODS = {
    "LlamaForCausalLMEagle3": "eagle3",
    "Eagle3LlamaForCausalLM": "eagle3",
    "DFlashDraftModel": "dflash",
    "Qwen3DSparkModel": "dspark",
    "MedusaModel": "medusa",
}


def speculative_config(directory: Path, tokens: int) -> dict[str, Any]:
    """Return vLLM's `--speculative-config` for an exported directory, or for a lookup's `config.json`.

    Raises:
        DeepSpecError: nothing that vLLM serves.
    """
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        raise DeepSpecError(f"{directory}: no readable config.json; export the draft first") from None
    medusa = config.get("model_type") == "medusa"  # which has no architectures: TGI knows it by that
    architecture = (config.get("architectures") or ["MedusaModel" if medusa else "?"])[0]
    if architecture in ("DeepSpecLookup", "DeepSpecSuffix"):
        least = config["min_match"]
        longest = least if architecture == "DeepSpecLookup" else max(8, least)  # a suffix of any length
        method = {"method": "ngram", "prompt_lookup_min": least, "prompt_lookup_max": longest}
        return method | {"num_speculative_tokens": tokens}
    name = _METHODS.get(architecture) or ("draft_model" if architecture.endswith("ForCausalLM") else None)
    if name is None:
        raise DeepSpecError(f"{directory}: vLLM serves no draft of architecture {architecture}")
    parallel = {"parallel_drafting": True} if config.get("parallel_drafting") else {}
    return {"method": name, "model": str(directory.resolve()), "num_speculative_tokens": tokens, **parallel}


def states_config(
    layers: Sequence[int], folder: Path, form: str = "bf16"
) -> tuple[dict[str, Any], list[str]]:
    """Return vLLM's `--speculative-config` and further arguments for a server that writes hidden states.

    Args:
        layers: the engine's own layer ids.
        folder: where it writes.
        form: of what it writes, a name in `deepspec.features.codec.CODECS`; in bf16 states stay as they are.
    """
    ids = {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}}
    method = {"method": STATES, "num_speculative_tokens": 1, "draft_model_config": ids}
    transfer = {
        "kv_connector": "DeepSpecStates",
        "kv_connector_module_path": "deepspec_states",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(folder), "form": form},
    }
    return method, ["--kv-transfer-config", json.dumps(transfer)]


@contextmanager
def serving(
    environment: Environment,
    target: Path,
    dtype: str,
    max_length: int,
    speculative: dict[str, Any] | None,
    name: str,
    sequences: int = 4,
    more: Sequence[str] = (),
) -> Iterator[str]:
    """Start a server of `target`; yield its address when it is ready to answer, end it on leaving.

    Args:
        speculative: `speculative_config` or `states_config`, or None for plain decoding.
        name: of its log in `.deepspec/serve`.
        sequences: decoded at once.
        more: arguments of vLLM's own.

    Raises:
        DeepSpecError: it ended or hung while starting.
    """
    port = free_port()
    command = [str(environment.python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(target.resolve()), "--served-model-name", MODEL, "--dtype", dtype]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(max_length)]
    command += ["--max-num-seqs", str(sequences), "--no-enable-prefix-caching", "--generation-config", "vllm"]
    if not environment.gpu:  # where a seeded request whose prompt is cut into chunks ends vLLM 0.32
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
        if latent(target):
            command += ["--compilation-config", json.dumps({"custom_ops": ["-rotary_embedding"]})]
    if speculative:
        command += ["--speculative-config", json.dumps(speculative)]
    variables = environment.variables()
    if speculative and speculative["method"] == STATES:
        variables |= {"PYTHONPATH": str(INSIDE)}
    with started("vLLM", [*command, *more], variables, port, name) as address:
        yield address


def latent(target: Path) -> bool:
    """Check whether a target's attention is latent, for whose queries vLLM 0.32's rotary kernel for CPUs is wrong."""
    try:
        config = json.loads((target / "config.json").read_text())
    except (OSError, ValueError):
        return False
    nested = config.get("text_config") if isinstance(config, dict) else None
    return any(isinstance(part, dict) and part.get("kv_lora_rank") is not None for part in (config, nested))


@contextmanager
def started(
    engine: str, command: list[str], variables: dict[str, str], port: int, name: str
) -> Iterator[str]:
    """Start a server; yield its address when it is ready to answer, end it on leaving.

    Args:
        engine: what it is called in messages.
        variables: of its environment.
        port: of 127.0.0.1, on which it is to listen; `/health` says that it is ready.
        name: of its log in `.deepspec/serve`.

    Raises:
        DeepSpecError: it ended or hung while starting, or ended while it served.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    own = str(log.resolve())
    _end_orphans(own)
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables | {OWN: own, STARTER: str(os.getpid())},
            cwd=LOGS,  # not here, where a directory might take a package's name
            start_new_session=True,
            preexec_fn=_ended_with_parent(),
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(process, address, log, engine)
        try:
            yield address
        except DeepSpecError:  # what a client says of a server that is gone
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDED_S)
            if process.returncode is None:
                raise
        if process.poll() is not None:
            raise DeepSpecError(f"{engine} ended while it served: {_reason(log, process)} ({log})")
    finally:
        _end(process)


def _ended_with_parent() -> Callable[[], object] | None:
    """Return what a new process calls so that it ends when this one does, however that is; None where none can."""
    if sys.platform != "linux":
        return None
    prctl, parent_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(parent_death_signal, signal.SIGTERM)


def _end_orphans(own: str) -> None:
    """End what is left of a server that was killed, or whose starter was: it holds the server's memory."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            variables = process.environ()
            if variables.get(OWN) == own and not _started_by(process, variables.get(STARTER)):
                process.kill()
                process.wait(STOP_S)


def _wait(process: subprocess.Popen, address: str, log: Path, engine: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DeepSpecError(f"{engine} ended while it started: {_reason(log, process)} ({log})")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/health", timeout=5).is_success:
                return
        time.sleep(0.5)
    raise DeepSpecError(f"{engine} did not answer within {START_S} s; its log is {log}")


def _reason(log: Path, process: subprocess.Popen) -> str:
    """Return the first error that the log names, since the later ones follow from it; else how the process ended."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if " WARNING " not in line]
    found = re.findall(r"\b\w*(?:Error|Exception): .+", "\n".join(lines))
    named = [line for line in found if "Engine core initialization failed" not in line]
    code = process.returncode
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return (named or found or [f"no error in its log, {ended}"])[0].strip()[:300]


def _end(process: subprocess.Popen) -> None:
    """End the server and its group, of which the engine is one; return when they and their memory are gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + STOP_S
    while _runs(process.pid) and time.monotonic() < deadline:  # a killed process goes when its turn comes
        time.sleep(0.05)


def _runs(group: int) -> bool:
    """Check whether a process of the group still runs. A zombie does not: it only waits for its parent to look."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _started_by(process: psutil.Process, starter: str | None) -> bool:
    """Check whether a process is a child of its starter, or of one that is: what outlives one of them is handed on."""
    return any(str(each.ppid()) == starter for each in (process, *process.parents()))


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
