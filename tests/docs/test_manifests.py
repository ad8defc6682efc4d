"""The Kubernetes manifest names what is there, its numbers agree, and its run can start."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mor_tools.pretraining.command_line import load_settings
from tests.docs.test_pages import ROOT

MANIFEST = ROOT / "examples" / "launch" / "kubernetes.yaml"
FIELDS = {  # of Kubernetes' API, at every place that the manifest fills; lists count as their items
    "": {"apiVersion", "kind", "metadata", "spec"},
    "Service.spec": {"clusterIP", "publishNotReadyAddresses", "selector", "ports"},
    "Job.spec": {
        "completionMode",
        "completions",
        "parallelism",
        "backoffLimitPerIndex",
        "template",
    },
    "Job.spec.template.spec": {
        *("subdomain", "restartPolicy", "terminationGracePeriodSeconds", "containers", "volumes"),
    },
    "Job.spec.template.spec.containers": {
        *("name", "image", "workingDir", "command", "args", "env", "resources", "volumeMounts"),
    },
}


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    return {found["kind"]: found for found in yaml.safe_load_all(MANIFEST.read_text())}


def test_fields_are_those_of_the_api(objects):
    assert {kind: found["apiVersion"] for kind, found in objects.items()} == {
        "Service": "v1",
        "Job": "batch/v1",
    }
    for place, fields in FIELDS.items():
        kind, *path = place.split(".")
        for found in [objects[kind]] if kind else objects.values():
            for name in path:
                found = found[name]
            for item in found if isinstance(found, list) else [found]:
                assert set(item) == fields, place


def test_numbers_and_names_agree(objects):
    job, service = objects["Job"]["spec"], objects["Service"]
    pod = job["template"]
    (container,) = pod["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["completions"] == job["parallelism"] == int(variables["NODES"])
    assert job["completionMode"] == "Indexed"
    assert pod["spec"]["restartPolicy"] == "Never"  # as backoffLimitPerIndex needs it
    name, host = objects["Job"]["metadata"]["name"], service["metadata"]["name"]
    (port,) = service["spec"]["ports"]
    # The first pod's name in the headless service, whose selector must find the pods.
    assert variables["RENDEZVOUS"] == f"{name}-0.{host}:{port['port']}"
    assert pod["spec"]["subdomain"] == host
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_command_is_a_launcher_whose_settings_can_start(objects, monkeypatch):
    monkeypatch.chdir(ROOT)
    (container,) = objects["Job"]["spec"]["template"]["spec"]["containers"]
    (script,) = container["command"]
    launcher = Path(script).read_text()
    for entry in container["env"]:
        assert re.search(rf"\b{entry['name']}\b", launcher), entry["name"]
    settings = load_settings(container["args"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    nodes = objects["Job"]["spec"]["completions"]
    assert settings.data_parallel_size(nodes * gpus) == nodes * gpus  # raises where it does not fit
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    for path in (settings.output, settings.data.path, settings.data.prepared_folder):
        assert path is not None and path.startswith(f"{mounted[0]}/")
    assert f"WORKDIR {container['workingDir']}" in (ROOT / "Dockerfile").read_text()
