# vdtrain with the versions of uv.lock. Needs an NVIDIA driver for CUDA 13 (R580 or newer) to use a GPU: docs/install.md.
FROM python:3.12-slim-bookworm

# Compilers for torch.compile and DeepSpeed's operators. Their versions are the distribution's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

RUN pip install --no-cache-dir uv==0.13.9

WORKDIR /vdtrain
COPY pyproject.toml uv.lock README.md LICENSE ./
RUN uv sync --locked --all-extras --no-extra distributed --no-dev --no-install-project --no-cache
COPY . .
RUN uv sync --locked --all-extras --no-extra distributed --no-dev --no-cache

ENV PATH="/vdtrain/.venv/bin:$PATH"
CMD ["vdtrain", "--help"]
