"""Kubernetes: manifests that the published models take, what they promise, and what is refused. No cluster here."""

from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.support import ROOT, SMOKE
from trainer import cli
from trainer import config as configs
from trainer.errors import EXIT_FINISHED, EXIT_USAGE, ConfigError, UsageError
from trainer.launch import kubernetes
from trainer.launch.kubernetes import Manifests

GIVEN = ["--image", "registry.example/toprope:1", "--claim", "shared", "--print"]


def submit(*arguments: str | Path) -> tuple[int, str]:
    """Exit status and output of `submit`, in this process."""
    done = CliRunner().invoke(cli.app, ["submit", *map(str, arguments)])
    if isinstance(done.exception, UsageError):
        return done.exception.exit_status, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def printed(on: str, *arguments: str) -> dict[str, dict[str, Any]]:
    """{kind and name: object} of what `submit --print` prints."""
    status, text = submit(SMOKE, "--on", on, *GIVEN, *arguments)
    assert status == EXIT_FINISHED, text
    return {f"{found['kind']} {found['metadata']['name']}": found for found in yaml.safe_load_all(text)}


def job_spec(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The spec of the Job, or of the Job that Kubeflow makes."""
    if "Job smoke" in found:
        return found["Job smoke"]["spec"]
    (node,) = found["TrainingRuntime smoke"]["spec"]["template"]["spec"]["replicatedJobs"]
    return node["template"]["spec"]


@pytest.mark.parametrize("nodes", ["3", "1:3"])
@pytest.mark.parametrize("on", kubernetes.KINDS)
def test_the_published_models_take_every_field_of_the_manifests(on, nodes):
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="scripts/setup installs kubeflow-trainer-api")
    of_kind = {
        "ConfigMap": models.IoK8sApiCoreV1ConfigMap, "Service": models.IoK8sApiCoreV1Service,
        "Job": models.IoK8sApiBatchV1Job, "TrainJob": models.TrainerV1alpha1TrainJob,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    }  # fmt: skip
    found = printed(on, "--nodes", nodes, "--gpus-per-node", "1", "--memory", "16Gi", "--set", "data.micro_batches=8")
    templates = found.pop("Deployment smoke-rendezvous")["spec"]["template"]
    # A model leaves out what it does not know: what comes back whole was known field by field.
    assert models.IoK8sApiCoreV1PodTemplateSpec.from_dict(templates).to_dict() == templates
    for given in found.values():
        assert of_kind[given["kind"]].from_dict(given).to_dict() == given


@pytest.mark.parametrize("on", kubernetes.KINDS)
def test_a_pod_has_the_time_to_save_and_no_more_rights_than_it_needs(on):
    spec = job_spec(printed(on, "--notice", "300"))
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] == 300 and "--shutdown-timeout=290" in container["command"]
    assert pod["restartPolicy"] == "Never" and pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True,
    }  # fmt: skip
    # All that a run writes to is mounted.
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted >= {"/runs", "/tmp", "/cache", "/dev/shm"} and mounted - {"/runs"} <= {*kubernetes.MOUNTED}


@pytest.mark.parametrize("on", kubernetes.KINDS)
def test_evictions_and_saved_ends_are_no_failures_and_a_wrong_config_ends_the_job(on):
    rules = job_spec(printed(on))["podFailurePolicy"]["rules"]
    by_condition = [(rule["action"], rule["onPodConditions"][0]["type"]) for rule in rules if "onPodConditions" in rule]
    by_status = {s: rule["action"] for rule in rules if "onExitCodes" in rule for s in rule["onExitCodes"]["values"]}
    assert by_condition == [("Ignore", "DisruptionTarget")]
    assert by_status == {75: "Ignore", 2: "FailJob", 76: "FailJob"}


def test_a_job_that_goes_on_with_fewer_pods_is_done_when_they_are():
    elastic, fixed = job_spec(printed("kubernetes", "--nodes", "2:3")), job_spec(printed("kubernetes", "--nodes", "3"))
    assert elastic["successPolicy"] == {"rules": [{"succeededCount": 2}]} and "successPolicy" not in fixed
    (of_elastic,), (of_fixed,) = (spec["template"]["spec"]["containers"] for spec in (elastic, fixed))
    assert "--nnodes=2:3" in of_elastic["command"] and "--nnodes=3" in of_fixed["command"]
    assert elastic["completions"] == elastic["parallelism"] == 3 and elastic["completionMode"] == "Indexed"


def test_agents_meet_at_a_store_that_no_pod_of_the_job_serves_and_ranks_at_the_names_of_pods():
    found = printed("kubernetes")
    store, names = found["Service smoke-rendezvous"]["spec"], found["Service smoke"]["spec"]
    template = found["Job smoke"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert "--rdzv-endpoint=smoke-rendezvous:29400" in container["command"] and store["ports"] == [
        {"port": 29400, "protocol": "TCP"}
    ]
    labels = found["Deployment smoke-rendezvous"]["spec"]["template"]["metadata"]["labels"]
    assert (
        store["selector"].items() <= labels.items()
        and not store["selector"].items() <= template["metadata"]["labels"].items()
    )
    assert names["selector"].items() <= template["metadata"]["labels"].items()
    assert (names["clusterIP"], template["spec"]["subdomain"]) == ("None", "smoke")


def test_the_pods_read_the_config_that_was_submitted(tmp_path):
    found = printed("kubernetes", "--run", "/data/runs/a_Run", "--set", "seed=7", "--set", "numerics.threads=2")
    (name,) = {key for key in found if key.startswith("Job")}
    assert name == "Job a-run"
    file = tmp_path / "config.toml"
    file.write_text(found["ConfigMap a-run"]["data"]["config.toml"])
    assert configs.load(file) == configs.load(SMOKE, ["seed=7", "numerics.threads=2"])
    pod = found[name]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][-3:] == ["/config/config.toml", "--run", "/data/runs/a_Run"]
    assert {"name": "runs", "mountPath": "/data/runs"} in container["volumeMounts"]
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "shared"}} in pod["volumes"]
    assert container["resources"]["requests"]["cpu"] == "2"


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--claim", "shared", "--print"], "--image is missing"),
        (["--image", "Not an image", "--claim", "shared", "--print"], "'Not an image' is no name of an image"),
        (["--image", "toprope", "--print"], "--claim is missing"),
        ([*GIVEN, "--claim", "a/b"], "'a/b' is no name of a claim"),
        ([*GIVEN, "--memory", "much"], "'much' is no amount of memory"),
        ([*GIVEN, "--memory", "500K"], "'500K' is no amount of memory"),
        ([*GIVEN, "--run", "runs/x"], "--run runs/x is no place in a pod"),
        ([*GIVEN, "--run", "/tmp/x"], "--run /tmp/x has the parent /tmp, which each pod has anyway"),
        ([*GIVEN, "--run", "/runs/" + "x" * 45], "gives no name for Kubernetes"),
        ([*GIVEN, "--notice", "5"], "--notice 5 leaves no time"),
        ([*GIVEN, "--nodes", "9"], "leaves 1 of 9 ranks without work"),
        ([*GIVEN, "--nodes", "0"], "'0' is no number of nodes"),
        ([*GIVEN, "--time", "2:00:00"], "--time without effect with --on kubernetes"),
        ([*GIVEN, "--slurm", "partition=gpu"], "--slurm without effect"),
        (GIVEN[:-1], "submits nothing itself"),
    ],
)
def test_a_bad_request_ends_with_2_and_prints_nothing(arguments, fact):
    status, said = submit(SMOKE, "--on", "kubernetes", *arguments)
    assert status == EXIT_USAGE and fact in said


@pytest.mark.parametrize("memory", ["500", "500k", "500M", "500Ki", "16Gi"])
def test_amounts_of_memory_are_taken_as_kubernetes_writes_them(memory):
    (container,) = job_spec(printed("kubernetes", "--memory", memory))["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"] == memory


def test_the_longest_name_leaves_room_for_what_is_added_to_it():
    name = "x" * kubernetes.LONGEST_NAME
    found = printed("kubeflow", "--run", f"/runs/{name}")
    assert f"TrainJob {name}" in found
    # The name of a pod of JobSet, which its webhook refuses as soon as one of 100,000 pods would have too long a one.
    (node,) = found[f"TrainingRuntime {name}"]["spec"]["template"]["spec"]["replicatedJobs"]
    names = [f"{name}-{node['name']}-0-99999-abcde", *(key.split()[1] for key in found)]
    assert max(map(len, names)) == 63


def test_options_of_kubernetes_are_refused_for_slurm():
    status, said = submit(SMOKE, "--on", "slurm", *GIVEN)
    assert status == EXIT_USAGE and "--image, --claim without effect with --on slurm" in said


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as refused:
        Manifests(PurePosixPath("/x"), "", "", "", 1, 1, 1, notice_seconds=1).check()
    assert len(refused.value.problems) == 4


def test_the_page_shows_commands_that_print_manifests(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "clusters.md").read_text()
    commands = [line.split() for line in page.splitlines() if line.startswith("python -m trainer submit")]
    found = [command for command in commands if "kubernetes" in command or "kubeflow" in command]
    assert len(found) == 2
    for command in found:
        status, text = submit(*command[4 : command.index(">")])
        assert status == EXIT_FINISHED and list(yaml.safe_load_all(text))
