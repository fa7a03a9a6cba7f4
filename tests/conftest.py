"""Where there is no GPU, Triton's kernels run in its interpreter. It has to know before they are defined: before kernels.py is imported."""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
