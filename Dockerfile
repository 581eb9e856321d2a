# For a machine with an NVIDIA GPU, its driver and the NVIDIA Container Toolkit:
#   docker build --tag alrp-triton .
#   docker run --rm --gpus all alrp-triton              # alrp-triton verify
#   docker run --rm --gpus all -it alrp-triton python
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# PyTorch and Triton bring what they need of CUDA, but for the driver. Triton compiles the launchers of its kernels, for
# which it needs a C compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/alrp-triton/bin:$PATH
RUN python3 -m venv /opt/alrp-triton
COPY . /src
RUN pip install --no-cache-dir '/src[cli]'

USER 1000
CMD ["alrp-triton", "verify"]
