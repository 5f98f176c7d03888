"""Where the tests of kernels run them: on a GPU, in the interpreter, or nowhere."""

import pytest
import torch

from nanolm.interpret import has_triton, interpreting

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
ON_GPU = DEVICE == "cuda" and has_triton()
RUNS = ON_GPU or interpreting()
with_kernels = pytest.mark.skipif(not RUNS, reason="Triton is not installed")
on_gpu = pytest.mark.skipif(not ON_GPU, reason="no GPU in use")
