"""The temperature control of a run, without a trainer."""

import pytest
import torch

from grpo_ext.rollout.temperature import TemperatureControl


def test_a_constant_temperature_stays():
    control = TemperatureControl(schedule="constant", start=0.8)
    assert not control.moves
    assert [control.next(step, 4) for step in range(4)] == [0.8] * 4


def test_the_linear_schedule_ends_with_the_last_step():
    control = TemperatureControl(schedule="linear", start=0.8, end=1.4)
    assert [control.next(step, 4) for step in range(4)] == pytest.approx([0.8, 1.0, 1.2, 1.4])


def entropy_control():
    return TemperatureControl(schedule="entropy", start=1.0, entropy_target=1.0)


def test_entropy_above_the_target_cools_and_masked_tokens_do_not_count():
    """The mean over the unmasked tokens of all updates since the last rollout is 2 nats; the gain is 0.2."""
    control = entropy_control()
    control.observe(torch.tensor([[3.0, 9.0]]), torch.tensor([[1, 0]]))
    control.observe(torch.tensor([[1.0, 9.0]]), torch.tensor([[1, 0]]))
    assert control.next(1, 4) == pytest.approx(torch.tensor(-0.2).exp().item())
    before = control.temperature
    assert control.next(2, 4) == before  # no update since


def test_its_state_contains_the_observed_entropies():
    """Guards against losing them in a run that is stopped between an update and the next rollout."""
    control, again = entropy_control(), entropy_control()
    control.observe(torch.tensor([[3.0]]), torch.tensor([[1]]))
    control.next(1, 4)
    control.observe(torch.tensor([[0.5]]), torch.tensor([[1]]))
    again.load_state_dict(control.state_dict())
    assert again.temperature == control.temperature
    assert again.next(2, 4) == control.next(2, 4) != 1.0
