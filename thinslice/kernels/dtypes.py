"""The float types that models are computed in, by the name they have in settings and plans."""

import torch

FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
