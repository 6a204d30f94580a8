"""What several dashboards ask for: their variables, which series those pick, rates, shares and quantiles."""

from __future__ import annotations

from deploy.grafana.layout import Query, Variable

SERVER = 'job=~"$job", instance=~"$instance"'
MODEL = f'{SERVER}, model=~"$model"'
VERSION = f'{MODEL}, version=~"$version"'

JOB = Variable("job", "Job", "label_values(espalier_machine_cpu_cores, job)")
INSTANCE = Variable("instance", "Server", 'label_values(espalier_machine_cpu_cores{job=~"$job"}, instance)')
MODEL_NAMES = Variable("model", "Model", f"label_values(espalier_model_info{{{SERVER}}}, model)")
VERSIONS = Variable("version", "Version", f"label_values(espalier_model_info{{{MODEL}}}, version)")


def rate(metric: str, labels: str, by: str = "") -> str:
    found = f"(rate({metric}{{{labels}}}[$__rate_interval]))"
    return f"sum by ({by}) {found}" if by else f"sum{found}"


def share(part: str, whole: str) -> str:
    """0 where there is none of it; nothing where there is nothing at all."""
    return f"(({part}) or 0 * ({whole})) / (({whole}) > 0)"


def quantile(of: float, metric: str, labels: str, by: str = "") -> str:
    return f"histogram_quantile({of}, {rate(f'{metric}_bucket', labels, f'{by}, le' if by else 'le')})"


def mean(metric: str, labels: str, by: str) -> str:
    return f"{rate(f'{metric}_sum', labels, by)} / ({rate(f'{metric}_count', labels, by)} > 0)"


def quantiles(metric: str, labels: str) -> list[Query]:
    return [Query(quantile(of, metric, labels), f"p{of * 100:g}") for of in (0.5, 0.9, 0.99)]
