# syntax=docker/dockerfile:1
# Serves models and trains none: no torch in it.
#     docker build -f deploy/docker/serve.Dockerfile -t espalier-serve .                     on CPUs
#     docker build -f deploy/docker/serve.Dockerfile --target cuda -t espalier-serve-cuda .  on NVIDIA GPUs
# BASE may name a digest: --build-arg BASE=python:3.11-slim-bookworm@sha256:…
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS packages
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/espalier
COPY requirements-serve.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/espalier/bin/pip install --no-deps --requirement requirements-serve.lock
COPY pyproject.toml README.md ./
COPY server server
COPY models models
COPY finetune finetune
COPY export export
# What the lock lacks of these is no part of plain serving: gRPC, object storage, traces.
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/espalier/bin/pip install --no-build-isolation --constraint requirements-serve.lock '.[grpc,storage,traces]'

# ONNX Runtime's CUDA and TensorRT providers are 0.3 GB that no CPU needs.
FROM packages AS packages-cpu
RUN rm -f /opt/espalier/lib/python3.*/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so \
          /opt/espalier/lib/python3.*/site-packages/onnxruntime/capi/libonnxruntime_providers_tensorrt.so

# NVIDIA's libraries as the wheels that torch 2.13 brings: one set, in every image. The server loads them by name.
FROM packages AS packages-cuda
COPY deploy/docker/requirements-cuda.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/espalier/bin/pip install --requirement requirements-cuda.txt

FROM ${BASE} AS server
LABEL org.opencontainers.image.title="Espalier, serving" \
      org.opencontainers.image.description="Serves ONNX models over HTTP with dynamic batching"
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin espalier \
    && install --directory --owner=espalier --group=espalier /var/lib/espalier
ENV PATH=/opt/espalier/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ESPALIER_HOST=0.0.0.0 \
    ESPALIER_HOME=/var/lib/espalier \
    ESPALIER_WORKER=false \
    ESPALIER_LOG_FORMAT=json
USER 10001:10001
WORKDIR /var/lib/espalier
VOLUME /var/lib/espalier
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
# The server is process 1: it handles SIGTERM itself, drains, and has no children here.
ENTRYPOINT ["espalier"]
CMD ["serve"]

FROM server AS cuda
COPY --from=packages-cuda /opt/espalier /opt/espalier
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM server AS cpu
COPY --from=packages-cpu /opt/espalier /opt/espalier
