# An image for training and serving on NVIDIA GPUs.
#
#     docker build --tag mor_layers .
#     docker run --gpus all --ipc host --rm -it mor_layers make test-gpu PYTHON=python
#
# This file has not been built or run by the maintainers, who have had no GPU: please report what
# you find. Set NVIDIA_PYTORCH to a current tag; it needs Python 3.12 and PyTorch 2.6 or newer. The image brings
# CUDA, NCCL, PyTorch and Transformer Engine in matching versions, so nothing here installs them again.
ARG NVIDIA_PYTORCH=25.10-py3
FROM nvcr.io/nvidia/pytorch:${NVIDIA_PYTORCH}

WORKDIR /opt/mor_layers
COPY . .
# The image's own constraint file (PIP_CONSTRAINT) keeps pip from replacing its PyTorch.
RUN pip install --no-cache-dir ".[megatron,hf,reports,examples,dev]"

# The server takes requests from outside the container only where you ask it to (--host 0.0.0.0).
EXPOSE 8000
