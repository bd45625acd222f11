"""Without a GPU Triton's kernels run in its interpreter. Triton must know before anything imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
