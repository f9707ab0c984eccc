# syntax=docker/dockerfile:1
# CUDA variant: the default; torch from the ordinary registry brings the CUDA libraries, built for every current card.
# CPU variant:  --build-arg VARIANT=cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Weights:      --build-arg MODELS=models/v15 bakes a folder of weights into a layer of its own, under the code.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG VARIANT=cuda
ARG TORCH="torch==2.13.0"
ARG TORCH_INDEX=""
# pip keeps no cache; compiled files stay: without them every cold start would compile torch again
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/worker
COPY requirements.lock scripts/install-locked scripts/slim-environment /tmp/
RUN sh /tmp/install-locked /opt/worker /tmp/requirements.lock "${VARIANT}" "${TORCH}" "${TORCH_INDEX}" \
    && sh /tmp/slim-environment /opt/worker

FROM ${BASE_IMAGE}
ARG MODELS=models/demo
ARG REVISION=unknown
LABEL org.opencontainers.image.title="musetalk-worker" \
      org.opencontainers.image.description="Lip-sync worker: MuseTalk 1.5 in plain PyTorch" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${REVISION}"
RUN useradd --create-home --uid 10001 worker && mkdir -p /app/outputs /cache && chown 10001 /app/outputs /cache
COPY --from=build /opt/worker /opt/worker
WORKDIR /app
COPY ${MODELS} /app/models/baked
COPY samples samples
COPY musetalk musetalk
COPY pipeline pipeline
COPY handler.py test_input.json LICENSE ./
RUN /opt/worker/bin/python -m compileall -q handler.py musetalk pipeline
ENV PATH=/opt/worker/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 REVISION=${REVISION} \
    MODEL_DIR=/app/models/baked CACHE_DIR=/cache HOST=0.0.0.0 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-m", "pipeline.job.health"]
# Python is PID 1, so SIGTERM reaches the worker: the queue door, or with `python -m pipeline.server` the HTTP door.
CMD ["python", "handler.py"]
