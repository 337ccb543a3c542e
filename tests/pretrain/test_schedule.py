"""Learning rates against torch's own schedulers and by their corners."""

import pytest
import torch
from pretrain.command_line import checked
from pretrain.schedule import lr_factor


def test_cosine_is_torchs():
    """Guards against a cosine that ends early, late or elsewhere: torch's schedulers, chained."""
    config = checked({"steps": 100, "warmup": 0.2, "final_lr": 0.1})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 20, 1, total_iters=19)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80, eta_min=0.1)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [20])
    for step in range(100):
        assert lr_factor(config, step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), step
        optimizer.step()
        both.step()


def test_constant_with_cooldown():
    """Guards against a cooldown of the wrong length or end."""
    config = checked({"steps": 100, "schedule": "constant", "warmup": 0.1, "cooldown": 0.2, "final_lr": 0.5})
    factors = [lr_factor(config, step) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:81] == [1.0] * 71
    assert factors[81:] == pytest.approx([1 - 0.5 * i / 20 for i in range(1, 20)])


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_short_runs(steps, schedule):
    """Guards against a division by zero, a rate of zero or above the peak where shares round to nothing."""
    config = checked({"steps": steps, "schedule": schedule})
    assert all(0 < lr_factor(config, step) <= 1 for step in range(steps))
