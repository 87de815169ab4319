"""What the children of the kill tests need, imported once by the server that forks them; one thread for safe forks."""

import torch

from ivcp_eval.vlmeval_bridge import register

torch.set_num_threads(1)
register()
