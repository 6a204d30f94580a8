# syntax=docker/dockerfile:1
# Trains and serves on NVIDIA GPUs: the host needs a driver for CUDA 13 (580 or newer) and the container toolkit.
#     docker build -f deploy/docker/cuda.Dockerfile -t espalier-cuda .
# BASE may name a digest: --build-arg BASE=python:3.11-slim-bookworm@sha256:…
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS packages
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/espalier
COPY requirements.lock pyproject.toml README.md ./
COPY server server
COPY models models
COPY finetune finetune
COPY export export
# torch 2.13.0 of PyPI brings CUDA 13 and cuDNN 9 as wheels; ONNX Runtime loads the same files, so that the image needs no
# CUDA of its own and has everything once.
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/espalier/bin/pip install --constraint requirements.lock '.[train,grpc,storage,traces]'

FROM ${BASE} AS server
LABEL org.opencontainers.image.title="Espalier, CUDA" \
      org.opencontainers.image.description="Fine-tunes networks over HTTP, exports them to ONNX and serves them"
# tini takes in what a training worker leaves behind; the server is its child and gets its signals.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin espalier \
    && install --directory --owner=espalier --group=espalier /var/lib/espalier
COPY --from=packages /opt/espalier /opt/espalier
ENV PATH=/opt/espalier/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/lib/espalier/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    ESPALIER_HOST=0.0.0.0 \
    ESPALIER_HOME=/var/lib/espalier \
    ESPALIER_LOG_FORMAT=json
USER 10001:10001
WORKDIR /var/lib/espalier
VOLUME /var/lib/espalier
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["/usr/bin/tini", "--", "espalier"]
CMD ["serve"]
