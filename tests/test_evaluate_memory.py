from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from ecodiff.evaluate.memory import peak_memory, tensors_of

MEGA = 250_000  # float32 values that make a megabyte


def test_the_peak_is_that_of_tensors_alive_together() -> None:
    def work() -> None:
        for _ in range(3):
            a = torch.ones(MEGA)
            b = a * 2  # two at a time
            del a, b

    assert peak_memory(work, [], "cpu") == 2.0


def test_views_and_in_place_results_take_nothing() -> None:
    def work() -> None:
        a = torch.ones(MEGA)
        a.view(500, 500).t().add_(1)

    assert peak_memory(work, [], "cpu") == 1.0


def test_weights_count_once_even_when_shared() -> None:
    linear = torch.nn.Linear(500, 500, bias=False)
    tied = torch.nn.Linear(500, 500, bias=False)
    tied.weight = linear.weight
    assert peak_memory(lambda: None, tensors_of(linear, tied), "cpu") == 1.0


def test_activations_kept_for_the_backward_pass_count_until_it_is_over() -> None:
    x = torch.ones(MEGA, requires_grad=True)

    def steps(*, recompute: bool) -> None:
        y = x
        for _ in range(8):
            # Each step keeps two results for its backward pass.
            step = lambda z: z.sin().cos().sin()  # noqa: E731
            y = checkpoint(step, y, use_reentrant=False) if recompute else step(y)
        y.sum().backward()
        x.grad = None

    kept = peak_memory(lambda: steps(recompute=False), [x], "cpu")
    recomputed = peak_memory(lambda: steps(recompute=True), [x], "cpu")
    assert kept >= 1 + 8 * 2 + 6
    assert recomputed <= 1 + 8 + 6
    assert kept == peak_memory(lambda: steps(recompute=False), [x], "cpu")
