"""docker/ without an engine: pins, health checks, no secret, the same services as `make up`."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from flows.services import Places, servers, worker
from flows.setup import DEPLOYMENTS, POOL

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
SERVICES = COMPOSE["services"]
ONCE = ("s3-bucket",)  # ends when its work is done
PREFECT = yaml.safe_load((ROOT / "prefect.yaml").read_text())


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_health_check_and_listens_on_the_host_s_loopback(name: str):
    assert name in ONCE or SERVICES[name]["healthcheck"]["test"]
    assert (name in ONCE) == ("restart" not in SERVICES[name])
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


def test_no_secret_is_written_down():
    text = re.sub(r":\?.*?\}", "}", (ROOT / "docker/compose.yaml").read_text()) + DOCKERFILE
    found = re.findall(r"\w*(?:PASSWORD|SECRET|ACCESS_KEY)\w*: *(\S+)|://\w+:(\S+?)@", text)
    assert len(found) >= 6
    assert all((value or login).startswith("${") for value, login in found)
    assert not re.findall(r"PASSWORD=\S", (ROOT / "docker/.env.example").read_text())
    assert ".env" in (ROOT / ".gitignore").read_text().split()


def test_every_variable_of_compose_has_a_default_or_is_asked_for():
    text = (ROOT / "docker/compose.yaml").read_text()
    assert not [name for name, rest in re.findall(r"\$\{(\w+)(.*?)\}", text) if rest[:2] not in (":-", ":?")]


def test_images_are_pinned_and_packages_come_from_constraints():
    for service in SERVICES.values():
        assert not service["image"].endswith(":latest") and ":" in service["image"]
    assert "ARG PYTHON_IMAGE=python:3.11-slim" in DOCKERFILE
    for command in re.findall(r"pip install ([^&\n]*)", DOCKERFILE):
        assert "-c constraints.txt" in command or "constraints.txt)" in command
    pins = (ROOT / "constraints.txt").read_text()
    assert PREFECT["prefect-version"] == re.search(r"^prefect==(.*)$", pins, re.M)[1]
    assert re.search(r"^torch==", pins, re.M)
    assert re.search(r"^SQLAlchemy==2\.0\.", pins, re.M)  # with 2.1 Prefect 3.8 schedules nothing


def test_the_image_has_no_root_and_a_health_check():
    final = DOCKERFILE.split(" AS final")[1]
    assert re.search(r"^USER [1-9]\d*$", final, re.M)
    assert "HEALTHCHECK" in final
    assert {"cpu", "cuda"} <= set(re.findall(r" AS (\w+)$", DOCKERFILE, re.M))


def test_the_page_of_prefect_is_written_where_its_user_may_and_is_asked_for():
    """A user without rights in site-packages got 404 for `/`, and the check asked for the API alone."""
    prefect = SERVICES["prefect"]
    assert prefect["environment"]["PREFECT_SERVER_UI_STATIC_DIRECTORY"].startswith("/data/")
    assert '("api/ready", "")' in prefect["healthcheck"]["test"][-1]
    assert prefect["environment"]["PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT"] == "false"


def test_the_worker_is_who_owns_the_checkout_and_its_links_lead_to_the_host():
    worker_ = SERVICES["worker"]
    assert worker_["user"] == "${DEEPSPEC_UID:-10001}:${DEEPSPEC_GID:-10001}"
    assert {"HOME": "/tmp", "LOGNAME": "deepspec"}.items() <= worker_["environment"].items()
    assert worker_["environment"]["PREFECT_UI_URL"].startswith("http://localhost:")
    assert worker_["environment"]["DEEPSPEC_MLFLOW_URL"].startswith("http://localhost:")


def test_one_service_builds_the_image_and_no_registry_is_asked_for_it():
    ours = [service for service in SERVICES.values() if service["image"].startswith("deepspec:")]
    assert sum("build" in service for service in ours) == 1
    assert all(service.get("pull_policy") == "never" for service in ours if "build" not in service)


def test_mlflow_starts_no_processes_for_traces():
    local = servers(Places.of(Path("/x")), lambda *_: "")[1].environment
    for environment in (local, SERVICES["mlflow"]["environment"]):
        assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_packages_of_an_object_store_are_pinned():
    """Without pins pip was still looking for versions after ten minutes."""
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {"boto3", "botocore", "aiobotocore", "s3fs", "dvc-s3", "s3transfer"} <= pins


def test_the_check_is_a_script_that_bash_reads_and_leaves_no_address_of_a_registry():
    script = ROOT / "docker/check.sh"
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    assert os.access(script, os.X_OK)
    hosts = set(re.findall(r"https?://([\w.-]+)", script.read_text()))
    assert hosts <= {"127.0.0.1", "localhost", "s3", "prefect", "mlflow"}


def test_what_the_image_copies_is_let_through():
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.M) for name in line.split()
    }
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)


def test_compose_starts_the_services_of_make_up():
    local = [*servers(Places.of(Path("/x")), lambda *_: ""), worker(Places.of(Path("/x")))]
    for service in local:
        words = " ".join(map(str, SERVICES[service.name]["command"]))
        sub = service.command[service.command.index("-m") + 1 :][:3]
        assert " ".join(word for word in sub if not word.startswith("-")) in words
    assert "--serve-artifacts" in SERVICES["mlflow"]["command"]
    allowed = next(word for word in SERVICES["mlflow"]["command"] if word.startswith("--allowed-hosts="))
    assert "mlflow:5000" in allowed
    assert SERVICES["s3"]["profiles"] == ["s3"]


def test_deployments_name_flows_that_exist_and_parameters_they_take():
    import inspect

    from flows.pipeline import pipeline
    from flows.promote import promote

    flows = {"flows/pipeline.py:pipeline": pipeline, "flows/promote.py:promote": promote}
    pools = set()
    for deployment in PREFECT["deployments"]:
        found = flows[deployment["entrypoint"]]
        assert set(deployment["parameters"]) <= set(inspect.signature(found.fn).parameters)
        pools.add(deployment["work_pool"]["name"])
    assert pools == {POOL, "docker"}
    names = {
        f"{flows[deployment['entrypoint']].name}/{deployment['name']}"
        for deployment in PREFECT["deployments"]
    }
    assert set(DEPLOYMENTS) <= names
