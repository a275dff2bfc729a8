# GRN in a container: `docker build -t grn .` for CPUs,
# `docker build --build-arg WHEELS=https://download.pytorch.org/whl/cu130 -t grn .` for NVIDIA GPUs (docker run --gpus all).
# Data and runs live in /work: docker run -v "$PWD:/work" grn train +experiment=digits_tokenizer
FROM python:3.12-slim

ARG WHEELS=https://download.pytorch.org/whl/cpu
ARG EXTRAS=cluster,critters,finetune,remote

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git g++ \
    && rm -rf /var/lib/apt/lists/*

# PyTorch alone first: a change of the code does not download it again.
RUN pip install --no-cache-dir --index-url "$WHEELS" "torch>=2.11" "torchvision>=0.26"

WORKDIR /opt/grn
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY grn grn
COPY hydra_plugins hydra_plugins
RUN pip install --no-cache-dir ".[$EXTRAS]" && useradd --create-home --uid 1000 grn && mkdir /work && chown grn /work

USER grn
WORKDIR /work
ENTRYPOINT ["grn"]
CMD ["--help"]
