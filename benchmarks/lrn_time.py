"""Time of our local response norm against torch's, forward and backward, one thread.

python benchmarks/lrn_time.py
"""

import torch
from step_time import measure

from flower_mcepl.models import local_response_norm


def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(128, 64, 30, 30, requires_grad=True)
    upstream = torch.randn_like(x)

    def stock() -> object:
        y = torch.nn.functional.local_response_norm(x, 4, alpha=1e-4, beta=0.75, k=1.0)
        return torch.autograd.grad(y, x, upstream)

    def ours() -> object:
        return torch.autograd.grad(local_response_norm(x, size=4, alpha=1e-4), x, upstream)

    times = measure({"torch": stock, "ours": ours}, repeats=7)
    print(
        f"local response norm of {list(x.shape)}, forward and backward: torch "
        f"{1000 * times['torch']:.0f} ms, ours {1000 * times['ours']:.0f} ms; ours / torch: "
        f"{times['ours'] / times['torch']:.3f}"
    )


if __name__ == "__main__":
    main()
