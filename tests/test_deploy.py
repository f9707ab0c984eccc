"""The deployments: valid for the tools that read them, and of one piece with the code that they start."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import psycopg
import pytest
import yaml

from pipeline.queue import schema
from pipeline.settings import REPOSITORY, Settings
from tests.fakes.postgres import database

MANIFESTS = sorted((REPOSITORY / "deploy" / "kubernetes").glob("*.yaml"))
COMPOSE = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
DOCUMENTS = [d for path in MANIFESTS for d in yaml.safe_load_all(path.read_text())]


def of_kind(kind: str) -> dict[str, Any]:
    """The one document of a kind."""
    (found,) = [d for d in DOCUMENTS if d["kind"] == kind]
    return found


def containers() -> list[dict[str, Any]]:
    return [c for d in DOCUMENTS if d["kind"] in ("Job", "Deployment") for c in d["spec"]["template"]["spec"]["containers"]]


def variables() -> list[tuple[str, str]]:
    """Every variable that is set for a worker, with its value."""
    composed = [s.get("environment", {}) for n, s in COMPOSE["services"].items() if n in ("worker", "schema")]
    return [(n, v) for e in composed for n, v in e.items()] + [
        (e["name"], e["value"]) for c in containers() for e in c.get("env", [])]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: f"{d['kind']} {d['metadata']['name']}")
def test_manifests_follow_kubernetes_schemas(document: dict[str, Any]) -> None:
    """Strictly: an unknown key fails. KEDA's kinds are its own, and checked below."""
    if document["apiVersion"].startswith("keda.sh/"):
        assert document["kind"] in ("ScaledObject", "TriggerAuthentication")
    else:
        kubernetes_validate.validate(document, "1.30", strict=True)


def test_the_validator_refuses_what_is_wrong() -> None:
    wrong = {**of_kind("Deployment"), "spec": {**of_kind("Deployment")["spec"], "replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.30", strict=True)


def test_the_scaler_counts_what_a_worker_would_take() -> None:
    """KEDA's query, on the real tables: what waits and runs, not what is due later, nor other queues' jobs."""
    scaled = of_kind("ScaledObject")["spec"]
    assert scaled["scaleTargetRef"]["name"] == of_kind("Deployment")["metadata"]["name"]
    (trigger,) = scaled["triggers"]
    assert trigger["authenticationRef"]["name"] == of_kind("TriggerAuthentication")["metadata"]["name"]
    with database() as url:
        schema.migrate(url)
        with psycopg.connect(url) as connection:
            connection.execute("""INSERT INTO procrastinate_jobs (queue_name, task_name, status, scheduled_at) VALUES
                ('musetalk', 'musetalk', 'todo', NULL), ('musetalk', 'musetalk', 'doing', NULL),
                ('musetalk', 'musetalk', 'todo', NOW() - INTERVAL '1 s'),
                ('musetalk', 'musetalk', 'todo', NOW() + INTERVAL '1 h'),
                ('musetalk', 'musetalk', 'failed', NULL), ('other', 'musetalk', 'todo', NULL)""")
            row = connection.execute(trigger["metadata"]["query"].encode()).fetchone()
    assert row == (3,)


def test_workers_are_given_time_to_end_their_job() -> None:
    deadline = Settings.from_env({}).job_deadline_sec
    assert of_kind("Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > deadline
    assert COMPOSE["services"]["worker"]["stop_grace_period"] == "10m"
    assert deadline < 600


def test_a_new_version_replaces_the_job_that_makes_the_tables() -> None:
    """`kubectl apply` cannot change the image of a Job that is there."""
    manifest = (REPOSITORY / "deploy/kubernetes/schema.yaml").read_text()
    (command,) = re.findall(r"kubectl replace --force -f \S+", manifest)
    assert command in (REPOSITORY / "docs/deploy.md").read_text()


def test_every_command_exists() -> None:
    """The first line of help of each module that a container starts, with the command that follows."""
    commands = [c["command"] for c in containers()] + [
        s["command"] for n, s in COMPOSE["services"].items() if n in ("worker", "schema")]
    assert all(command[:2] == ["python", "-m"] for command in commands)
    for command in {tuple(command) for command in commands}:
        plain = [word for word in command[2:] if not word.startswith("-") and "/" not in word]
        done = subprocess.run([sys.executable, "-m", *plain, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_variable_is_a_setting() -> None:
    assert {name for name, _ in variables()} <= {name.upper() for name in Settings.model_fields}
    values = {n: v for n, v in variables() if n not in ("DATABASE_URL", "MODEL_DIR")}
    Settings.from_env(values)


def compose_check(path: Path) -> subprocess.CompletedProcess[str]:
    """A file held against the Compose specification's schema."""
    return subprocess.run([Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", path],
                          capture_output=True, text=True)


def test_compose_follows_its_specification(tmp_path: Path) -> None:
    """Strictly: an unknown key fails."""
    assert compose_check(REPOSITORY / "compose.yaml").returncode == 0
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((REPOSITORY / "compose.yaml").read_text().replace("replicas: 2", "replica: 2"))
    assert "'replica'" in compose_check(wrong).stdout


def test_compose_starts_the_schema_before_the_workers_of_one_image() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        assert set(service.get("depends_on", {})) <= services.keys()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (REPOSITORY / source).exists(), volume
    assert services["worker"]["depends_on"] == {"schema": {"condition": "service_completed_successfully"}}
    assert services["worker"]["image"] == services["schema"]["image"]
    assert services["worker"]["deploy"]["replicas"] == 2
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    for path in (v.split(":")[1] for v in services["worker"]["volumes"]):
        assert re.search(rf"chown 10001 .*{path}\b", dockerfile), "a new volume takes the folder's owner from the image"


def test_prometheus_scrapes_the_workers_port() -> None:
    (job,) = yaml.safe_load((REPOSITORY / "deploy/prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["dns_sd_configs"]
    assert target["names"] == ["worker"]
    assert str(target["port"]) == COMPOSE["services"]["worker"]["environment"]["QUEUE_METRICS_PORT"]


def test_the_image_holds_the_queues_packages() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text()
    for line in (REPOSITORY / "requirements-queue.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.sub(r"\[\w+\]", "", line.split()[0]) in lock


@pytest.mark.parametrize("name", ["one machine", "Compose", "Kubernetes", "RunPod queue", "RunPod load balancer"])
def test_every_place_has_its_chapter(name: str) -> None:
    text = (REPOSITORY / "docs/deploy.md").read_text()
    assert f"\n## {name[0].upper()}{name[1:]}\n" in text
    for path in set(re.findall(r"(?:deploy/[\w./-]+\.yaml|compose\.yaml)", text)):
        assert Path(REPOSITORY / path).exists(), path
