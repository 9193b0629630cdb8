"""Kubernetes: a run as manifests for `kubectl apply -f`: a plain Job, or a TrainJob of Kubeflow Trainer.

    ConfigMap NAME                       the whole config, which every start reads
    Deployment, Service NAME-rendezvous  the store at which the agents meet; it belongs to no pod of the job
    Service NAME                         headless: the names of the pods, at which ranks meet
    Job NAME                             one torchrun agent in each pod, one pod for each node
    TrainingRuntime, TrainJob NAME       the same for Kubeflow, whose JobSet names the pods itself

A pod that is evicted gets SIGTERM: all ranks save and leave with 75, and all pods are started again. Such ends, and
those of pods that lose their node, are not counted as failures; wrong usage and a node in quarantine end the job.
Nothing here talks to a cluster.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from trainer.errors import EXIT_PREEMPTED, EXIT_QUARANTINED, EXIT_USAGE, ConfigError
from trainer.launch.slurm import LEAST_NOTICE_SECONDS, LEAVING_SECONDS, RENDEZVOUS, RESTARTS
from trainer.parallel.elastic import NODE_NAMES

KINDS = ("kubernetes", "kubeflow")
JOIN_SECONDS = 3600
"""Pods that have started wait for the others for so long: until the cluster has room for them."""
FAILURES_PER_NODE = 5
UNREACHABLE_SECONDS = 30
"""After so long a pod on a node that does not answer is given up; Kubernetes' own default is 300."""
PORT = 29400
USER = 1000
CONFIG = "/config/config.toml"
QUANTITY = r"[1-9]\d*([kMGT]|[KMGT]i)?"
IMAGE = r"[a-z0-9][\w.:/-]*(@sha256:[0-9a-f]{64})?"
LONGEST_NAME = 44
"""A name has at most 63 characters: NAME-rendezvous, and what JobSet calls its pods, NAME-node-0-12345-abcde."""
MOUNTED = ("/tmp", "/cache", "/config", "/dev", "/dev/shm")
"""Places that each pod has anyway. Kubernetes refuses a second mount at one of them, or the claim would hide it."""


@dataclass(frozen=True)
class Manifests:
    """A run on Kubernetes."""

    run: PurePosixPath
    """Run directory in the pods, absolute. The claim is mounted at its parent."""
    config: str
    """The whole config, as TOML."""
    image: str
    claim: str
    """PersistentVolumeClaim that all pods can write to."""
    fewest: int
    nodes: int
    """Pods that the job asks for. It starts, and goes on, with any number from `fewest`."""
    ranks: int
    """Ranks in each pod."""
    threads: int = 1
    """CPU threads of each rank."""
    gpus_per_node: int | None = None
    memory: str = ""
    """Memory of each pod, as Kubernetes takes it; empty: no limit."""
    notice_seconds: int = 120
    """From a pod's SIGTERM to its end."""
    arguments: Sequence[str] = ()
    """Further arguments of `trainer train`."""

    @property
    def name(self) -> str:
        """Name of all objects: the run's, in the letters that Kubernetes allows."""
        return re.sub(r"[^a-z0-9]+", "-", self.run.name.lower()).strip("-")

    def check(self) -> None:
        """Raise ConfigError, with all problems, for what Kubernetes would refuse or what could never save."""
        problems: list[str] = []
        if not self.image:
            problems.append("--image is missing.\n  Pods run an image with toprope in it: docker/Dockerfile makes one.")
        elif not re.fullmatch(IMAGE, self.image):
            problems.append(f"--image {self.image!r} is no name of an image.\n  Write REGISTRY/NAME:TAG.")
        if not self.claim:
            problems.append(
                "--claim is missing.\n  What a pod writes elsewhere is lost with it. Give the name of a "
                f"PersistentVolumeClaim{' that several nodes can write to (ReadWriteMany)' if self.nodes > 1 else ''}."
            )
        elif not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", self.claim):
            problems.append(f"--claim {self.claim!r} is no name of a claim.\n  Give one that `kubectl get pvc` shows.")
        if self.memory and not re.fullmatch(QUANTITY, self.memory):
            problems.append(f"--memory {self.memory!r} is no amount of memory.\n  Write 16Gi or 500M.")
        if not re.match("[a-z]", self.name) or len(self.name) > LONGEST_NAME:
            problems.append(
                f"{self.run.name!r} gives no name for Kubernetes, which begins with a letter and has at most "
                f"{LONGEST_NAME} characters.\n  Give another --run."
            )
        if not self.run.is_absolute() or len(self.run.parts) < 3 or ".." in self.run.parts:
            problems.append(
                f"--run {self.run} is no place in a pod.\n  The claim is mounted at its parent: give a path like "
                "/runs/NAME."
            )
        elif str(self.run.parent) in MOUNTED:
            problems.append(
                f"--run {self.run} has the parent {self.run.parent}, which each pod has anyway.\n  The claim is "
                "mounted at the parent: give a path like /runs/NAME."
            )
        if self.notice_seconds < LEAST_NOTICE_SECONDS:
            problems.append(
                f"--notice {self.notice_seconds} leaves no time to save and leave.\n  Ranks finish their step and "
                f"write a checkpoint in it. Give at least {LEAST_NOTICE_SECONDS} seconds."
            )
        if problems:
            raise ConfigError(problems)

    def objects(self, kind: str) -> list[dict[str, Any]]:
        """Return the objects to apply, for a kind of KINDS. Raises ConfigError for what Kubernetes would refuse."""
        self.check()
        shared = [self._config_map(), self._deployment(), self._service(f"{self.name}-rendezvous", self._store_labels)]
        return [*shared, *(self._plain() if kind == "kubernetes" else self._kubeflow())]

    def text(self, kind: str) -> str:
        """Return the objects as YAML, with a few lines on how to use it."""
        import yaml

        class Dumper(yaml.SafeDumper):
            """Shows texts of several lines as such, and the same object twice instead of a reference."""

            def ignore_aliases(self, data: Any) -> bool:
                return True

        def represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
            return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

        Dumper.add_representer(str, represent)
        watched = "job" if kind == "kubernetes" else "trainjob"
        head = (
            "# Written by `python -m trainer submit`.\n"
            f"#   kubectl apply -f FILE     start, or give `kubectl get {watched} {self.name}` to watch\n"
            "#   kubectl delete -f FILE    end it: ranks save. The same two commands resume.\n"
        )
        return head + yaml.dump_all(self.objects(kind), Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True)

    # Objects

    def _plain(self) -> list[dict[str, Any]]:
        job = {
            "apiVersion": "batch/v1", "kind": "Job", "metadata": self._metadata(),
            "spec": {"completions": self.nodes, "parallelism": self.nodes, **self._job_spec({"subdomain": self.name})},
        }  # fmt: skip
        return [self._service(self.name, self._pod_labels, headless=True), job]

    def _kubeflow(self) -> list[dict[str, Any]]:
        # Kubeflow finds what trains by this label and by the container's name; it sets completions and parallelism.
        node = {
            "name": "node",
            "template": {
                "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                "spec": self._job_spec({}),
            },
        }
        runtime = {
            "apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainingRuntime",
            "metadata": self._metadata() | {"labels": self._labels | {"trainer.kubeflow.org/framework": "torch"}},
            "spec": {
                "mlPolicy": {"numNodes": self.nodes, "torch": {}},
                "template": {"spec": {"replicatedJobs": [node]}},
            },
        }  # fmt: skip
        job = {
            "apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": self._metadata(),
            "spec": {
                "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": self.name},
                "trainer": {"numNodes": self.nodes, "numProcPerNode": self.ranks},
            },
        }  # fmt: skip
        return [runtime, job]

    def _job_spec(self, pod: Mapping[str, Any]) -> dict[str, Any]:
        spec: dict[str, Any] = {
            "completionMode": "Indexed",
            "backoffLimit": FAILURES_PER_NODE * self.nodes,
            "podReplacementPolicy": "Failed",  # the only one that goes with a podFailurePolicy
            "podFailurePolicy": {
                "rules": [
                    # Drained, preempted, or evicted from a node that is gone.
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    # Saved, because another pod was.
                    {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [EXIT_PREEMPTED]}},
                    {
                        "action": "FailJob",
                        "onExitCodes": {"operator": "In", "values": [EXIT_USAGE, EXIT_QUARANTINED]},
                    },
                ]
            },
        }
        if self.fewest < self.nodes:
            # Pods for which there is no room must not keep a run open that the others have finished.
            spec["successPolicy"] = {"rules": [{"succeededCount": self.fewest}]}
        elastic = f"{self.fewest}:{self.nodes}" if self.fewest < self.nodes else str(self.nodes)
        command = [
            "python", "-m", "trainer.launch.torchrun", f"--nnodes={elastic}", f"--nproc-per-node={self.ranks}",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={self.name}-rendezvous:{PORT}", f"--rdzv-id={self.name}",
            f"--rdzv-conf={RENDEZVOUS},resumable=1,join_timeout={JOIN_SECONDS}", f"--max-restarts={RESTARTS}",
            f"--shutdown-timeout={self.notice_seconds - LEAVING_SECONDS}",
            "-m", "trainer", "train", CONFIG, "--run", str(self.run), *self.arguments,
        ]  # fmt: skip
        resources: dict[str, dict[str, Any]] = {"requests": {"cpu": str(self.ranks * self.threads)}}
        if self.memory:
            resources["requests"]["memory"] = self.memory
            resources["limits"] = {"memory": self.memory}
        if self.gpus_per_node:
            resources.setdefault("limits", {})["nvidia.com/gpu"] = str(self.gpus_per_node)
        volumes: dict[str, tuple[str, dict[str, Any]]] = {
            "runs": (str(self.run.parent), {"persistentVolumeClaim": {"claimName": self.claim}}),
            "config": (str(PurePosixPath(CONFIG).parent), {"configMap": {"name": self.name}}),
            "cache": ("/cache", {"emptyDir": {}}),
            "tmp": ("/tmp", {"emptyDir": {}}),
            "shm": ("/dev/shm", {"emptyDir": {"medium": "Memory"}}),  # gloo, NCCL and checkpoints in memory
        }
        container = self._container("node", command) | {
            "resources": resources,
            "volumeMounts": [{"name": name, "mountPath": path} for name, (path, _) in volumes.items()],
        }
        container["env"] += [
            {"name": "TOPROPE_CACHE", "value": "/cache"},
            {"name": NODE_NAMES[0], "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ]
        spread = {
            "maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": self._pod_labels},
        }  # fmt: skip
        spec["template"] = {
            "metadata": {"labels": self._labels | self._pod_labels},
            "spec": {
                **pod,
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": self.notice_seconds,
                **self._of_every_pod(),
                "topologySpreadConstraints": [spread],
                "containers": [container],
                "volumes": [{"name": name, **source} for name, (_, source) in volumes.items()],
            },
        }
        return spec

    def _deployment(self) -> dict[str, Any]:
        command = ["python", "-m", "trainer", "rendezvous", "--listen", f"0.0.0.0:{PORT}"]
        container = self._container("rendezvous", command) | {
            "ports": [{"containerPort": PORT, "protocol": "TCP"}],
            "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 2},
            "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}},
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
        pod = {
            **self._of_every_pod(), "containers": [container], "volumes": [{"name": "tmp", "emptyDir": {}}],
            "terminationGracePeriodSeconds": 5,
        }  # fmt: skip
        return {
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": self._metadata(f"{self.name}-rendezvous"),
            "spec": {
                "replicas": 1,
                "strategy": {"type": "Recreate"},  # two stores would be two meetings
                "selector": {"matchLabels": self._store_labels},
                "template": {"metadata": {"labels": self._labels | self._store_labels}, "spec": pod},
            },
        }  # fmt: skip

    def _config_map(self) -> dict[str, Any]:
        return {
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": self._metadata(),
            "data": {PurePosixPath(CONFIG).name: self.config},
        }  # fmt: skip

    def _service(self, name: str, selector: Mapping[str, str], headless: bool = False) -> dict[str, Any]:
        how: dict[str, Any] = {"selector": dict(selector)}
        if headless:  # names of pods, also of those that are not ready yet
            how |= {"clusterIP": "None", "publishNotReadyAddresses": True}
        else:
            how["ports"] = [{"port": PORT, "protocol": "TCP"}]
        return {"apiVersion": "v1", "kind": "Service", "metadata": self._metadata(name), "spec": how}

    # Parts

    def _metadata(self, name: str = "") -> dict[str, Any]:
        return {"name": name or self.name, "labels": self._labels}

    @property
    def _labels(self) -> dict[str, str]:
        return {"app.kubernetes.io/name": "toprope", "app.kubernetes.io/instance": self.name}

    @property
    def _pod_labels(self) -> dict[str, str]:
        return {"toprope/run": self.name}

    @property
    def _store_labels(self) -> dict[str, str]:
        return {"toprope/rendezvous-of": self.name}

    def _container(self, name: str, command: Sequence[str]) -> dict[str, Any]:
        return {
            "name": name, "image": self.image, "command": list(command), "env": [{"name": "HOME", "value": "/tmp"}],
            "securityContext": {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True,
            },
        }  # fmt: skip

    def _of_every_pod(self) -> dict[str, Any]:
        gone = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
        return {
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
            },
            "tolerations": [
                {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": UNREACHABLE_SECONDS}
                for key in gone
            ],
        }  # fmt: skip
