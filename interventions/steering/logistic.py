"""A logistic regression, as the probes of bases and of evidence fit it."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


@torch.enable_grad()
def logistic(
    x: Float[Tensor, "row d"], y: Float[Tensor, " row"], penalty: float, *, steps: int
) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
    """Weights and intercept with the least mean cross-entropy plus penalty * |weights|^2, in the type of x."""
    weights = x.new_zeros(x.shape[1]).requires_grad_()
    intercept = x.new_zeros(()).requires_grad_()
    optimizer = torch.optim.LBFGS([weights, intercept], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(x @ weights + intercept, y) + penalty * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach(), intercept.detach()
