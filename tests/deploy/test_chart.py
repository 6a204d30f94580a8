"""The Helm chart, rendered by Helm itself and held against Kubernetes's schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.settings import load

helm = pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for this machine")

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "espalier"
RULES = ROOT / "deploy" / "prometheus" / "rules"
KUBERNETES = ("1.30", "1.34")
# Of operators: no part of Kubernetes, so no schema of it.
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}

SHARED = {"accessModes": ["ReadWriteMany"], "storageClassName": "nfs"}
CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "gpu": {
        "image": {"repository": "registry.example.com/espalier-cuda", "digest": f"sha256:{'0' * 64}"},
        "imagePullSecrets": [{"name": "registry"}],
        "gpu": {"count": 2, "runtimeClassName": "nvidia"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "nodeSelector": {"gpu": "h100"},
    },
    "serving alone, many": {
        "replicaCount": 3,
        "persistence": SHARED,
        "settings": {"worker": False, "providers": ["CPUExecutionProvider"], "grpc_port": 8001},
        "secret": {"values": {"ESPALIER_DATABASE": "postgresql+psycopg://espalier:secret@db/espalier"}},
        "networkPolicy": {"enabled": True, "from": [{"namespaceSelector": {"matchLabels": {"team": "web"}}}]},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
    },
    "scaled by the queue": {
        "persistence": SHARED,
        "autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 5, "targetQueueSeconds": 0.1},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True},
    },
    "scaled by KEDA": {
        "persistence": {"enabled": False},
        "keda": {"enabled": True, "targetQueueSeconds": 0.2},
        "serviceMonitor": {"enabled": True, "keySecret": {"name": "scraper", "key": "token"}},
        "settings": {"open_metrics": False},
    },
    "what is there already": {
        "persistence": {"existingClaim": "models"},
        "secret": {"existing": "database"},
        "serviceAccount": {"create": False},
        "fullnameOverride": "inference",
        "settings": {"drain_seconds": 120.5},
        "service": {"type": "LoadBalancer", "port": 80},
    },
}


@pytest.fixture(scope="module")
def chart() -> Any:
    with helm.Chart.load(str(CHART)) as found:
        yield found


def render(chart: Any, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Manifests by kind; the test pod as "TestPod". A kind is there once."""
    found: dict[str, dict[str, Any]] = {}
    for path, text in chart.render(values, name="team", namespace="ml").items():
        if path.endswith("NOTES.txt"):
            continue
        for manifest in yaml.safe_load_all(text):
            if manifest is not None:
                kind = "TestPod" if "/tests/" in path else manifest["kind"]
                assert kind not in found
                found[kind] = manifest
    return found


def container(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (only,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_is_rendered_is_valid(case: str, chart: Any) -> None:
    manifests = render(chart, CASES[case])
    for kind, manifest in manifests.items():
        if kind not in CUSTOM:
            for version in KUBERNETES:
                kubernetes_validate.validate(manifest, version, strict=True)
    names = {manifest["metadata"]["name"] for manifest in manifests.values()}
    assert names == {"inference", "inference-ready"} if "what" in case else {"team-espalier", "team-espalier-ready"}
    report = helm.lint(str(CHART), CASES[case], strict=True, kube_version="v1.34.0")
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] >= 2] == []


@pytest.mark.parametrize("case", CASES)
def test_the_service_and_the_rest_find_the_pods(case: str, chart: Any) -> None:
    manifests = render(chart, CASES[case])
    pod = manifests["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"].items()
    assert manifests["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels
    assert manifests["Service"]["spec"]["selector"].items() <= labels
    assert "app.kubernetes.io/component" not in manifests["Service"]["spec"]["selector"]
    ports = {port["name"]: port["containerPort"] for port in container(manifests)["ports"]}
    assert {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]} == ports.keys()
    if "PodDisruptionBudget" in manifests:
        assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels
    if "NetworkPolicy" in manifests:
        assert manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels
        allowed = {port["port"] for rule in manifests["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]}
        assert allowed == ports.keys()
    claims = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["spec"]["volumes"]]
    if "PersistentVolumeClaim" in manifests:
        assert manifests["PersistentVolumeClaim"]["metadata"]["name"] in claims
    mounted = {mount["name"] for mount in container(manifests)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


@pytest.mark.parametrize("case", CASES)
def test_settings_become_variables_that_the_server_knows(case: str, chart: Any) -> None:
    manifests = render(chart, CASES[case])
    given = manifests["ConfigMap"]["data"] | manifests.get("Secret", {}).get("stringData", {})
    found = load({}, given)
    assert found.unknown == []
    assert found.settings.host == "0.0.0.0"
    ports = {port["containerPort"] for port in container(manifests)["ports"]}
    assert found.settings.port in ports
    homes = [mount["mountPath"] for mount in container(manifests)["volumeMounts"] if mount["name"] == "home"]
    assert homes == [str(found.settings.home)]
    for field, value in CASES[case].get("settings", {}).items():
        assert getattr(found.settings, field) == value


@pytest.mark.parametrize("case", CASES)
def test_a_pod_has_the_time_to_drain(case: str, chart: Any) -> None:
    manifests = render(chart, CASES[case])
    drain = load({}, manifests["ConfigMap"]["data"]).settings.drain_seconds
    pause = container(manifests)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert manifests["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= pause + drain + 10


def test_probes_ask_what_the_server_answers(chart: Any) -> None:
    from server.routes import health

    paths = {path for handler in health.handlers for path in handler.paths}
    found = container(render(chart, {"probes": {"startupSeconds": 600}}))
    assert {found[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")} <= paths
    assert found["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert found["startupProbe"]["periodSeconds"] * found["startupProbe"]["failureThreshold"] == 600


def test_a_gpu_is_asked_for_and_the_other_limits_stay(chart: Any) -> None:
    manifests = render(chart, CASES["gpu"])
    assert container(manifests)["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": "2"}
    assert container(manifests)["image"] == f"registry.example.com/espalier-cuda@sha256:{'0' * 64}"
    assert manifests["Deployment"]["spec"]["template"]["spec"]["runtimeClassName"] == "nvidia"


def test_one_volume_for_one_server_is_handed_over_and_a_shared_one_is_not(chart: Any) -> None:
    assert render(chart, {})["Deployment"]["spec"]["strategy"]["type"] == "Recreate"
    assert render(chart, {"persistence": SHARED})["Deployment"]["spec"]["strategy"]["type"] == "RollingUpdate"


def test_the_autoscaler_reads_what_the_adapter_makes_of_the_recording_rule(chart: Any) -> None:
    manifests = render(chart, CASES["scaled by the queue"])
    assert "replicas" not in manifests["Deployment"]["spec"]
    (metric,) = manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["target"]["averageValue"] == "100m"
    adapter = yaml.safe_load((CHART.parent / "prometheus-adapter.yml").read_text())["rules"]["custom"][0]
    assert adapter["name"]["as"] == metric["pods"]["metric"]["name"]
    recorded = {
        rule["record"]
        for group in yaml.safe_load((RULES / "recording.yml").read_text())["groups"]
        for rule in group["rules"]
    }
    assert adapter["seriesQuery"].partition("{")[0] in recorded


def test_the_operators_rules_are_those_of_this_repository(chart: Any) -> None:
    made = render(chart, CASES["scaled by the queue"])["PrometheusRule"]["spec"]["groups"]
    written = [group for path in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]]
    assert made == written


def test_the_service_monitor_names_the_port_and_the_job(chart: Any) -> None:
    manifests = render(chart, CASES["scaled by KEDA"])
    spec = manifests["ServiceMonitor"]["spec"]
    assert spec["selector"]["matchLabels"].items() <= manifests["Service"]["metadata"]["labels"].items()
    assert manifests["Service"]["metadata"]["labels"][spec["jobLabel"]] == "espalier"  # as rules and dashboards have it
    (endpoint,) = spec["endpoints"]
    assert endpoint["port"] in {port["name"] for port in manifests["Service"]["spec"]["ports"]}
    assert endpoint["authorization"] == {"credentials": {"name": "scraper", "key": "token"}}


def test_keda_asks_prometheus_for_this_release(chart: Any) -> None:
    manifests = render(chart, CASES["scaled by KEDA"])
    spec = manifests["ScaledObject"]["spec"]
    assert spec["scaleTargetRef"]["name"] == manifests["Deployment"]["metadata"]["name"]
    (trigger,) = spec["triggers"]
    assert (
        'espalier_stage_seconds_sum{namespace="ml", service="team-espalier", stage="queue"}'
        in trigger["metadata"]["query"]
    )
    assert trigger["metadata"]["threshold"] == "0.2"
    assert all(isinstance(value, str) for value in trigger["metadata"].values())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replicaCount": 2}, "ReadWriteMany"),
        ({"autoscaling": {"enabled": True}, "keda": {"enabled": True}, "persistence": SHARED}, "enable one"),
        ({"settings": {"port": 9000}}, "settings.port is the chart's"),
    ],
)
def test_what_would_not_work_is_refused_in_words(values: dict[str, Any], words: str, chart: Any) -> None:
    with pytest.raises(helm.HelmError, match=words):
        chart.render(values, name="team", namespace="ml")


@pytest.mark.parametrize(
    "values",
    [
        {"replicas": 2},
        {"gpu": {"count": "one"}},
        {"image": {"digest": "latest"}},
        {"settings": {"Drain-Seconds": 3}},
        {"drain": {"preStopSeconds": 0}},
        {"serviceMonitor": {"keySecret": {"name": "scraper"}}},
    ],
)
def test_values_of_the_wrong_kind_are_refused(values: dict[str, Any], chart: Any) -> None:
    with pytest.raises(helm.HelmError):
        chart.validate_schema(values)


def test_the_notes_say_how_to_make_the_first_key(chart: Any) -> None:
    def notes(values: dict[str, Any]) -> str:
        rendered = chart.render(values, name="team", namespace="ml")
        return next(str(text) for path, text in rendered.items() if path.endswith("NOTES.txt"))

    assert "exec deployment/team-espalier -- espalier keys create --name me --scopes admin" in notes({})
    assert "keys create" not in notes({"settings": {"auth": "off"}})
