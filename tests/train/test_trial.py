"""What the trial of attention finds; on a GPU it is tried in tests/gpu."""

import math

import pytest

torch = pytest.importorskip("torch")

from nemotron_sft.train import trial  # noqa: E402
from nemotron_sft.train.compat.attention import attend  # noqa: E402

ENDS = torch.tensor(trial.ENDS)


def right(query, key, value):
    return attend(query, key, value, ENDS, query.shape[-1] ** -0.5)


def errors(attention, width=32):
    return trial.gradient_errors(attention, 4, 2, width, torch.bfloat16)


def altered(change):
    """Attention whose output is right, and the gradient of whose keys is changed."""

    def attention(query, key, value):
        key = key.clone()
        key.register_hook(change)
        return right(query, key, value)

    return attention


def test_right_gradients_are_within_the_tolerance():
    found = errors(right)
    assert list(found) == ["queries", "keys", "values"]
    assert 0 < max(found.values()) < trial.TOLERANCE / 5


@pytest.mark.parametrize(
    "change",
    [
        lambda gradient: torch.cat([gradient[..., :24], torch.zeros_like(gradient[..., 24:])], -1),
        lambda gradient: torch.cat([gradient[:-64], torch.zeros_like(gradient[-64:])]),
        lambda gradient: gradient * 1.1,
    ],
    ids=["a quarter of a head is missing", "the end of a row is missing", "a tenth too much"],
)
def test_wrong_gradients_are_outside_of_it(change):
    found = errors(altered(change))
    assert found["keys"] > trial.TOLERANCE > 5 * max(found["queries"], found["values"])


def test_errors_are_relative_to_the_right_gradients():
    assert errors(altered(lambda gradient: 3 * gradient))["keys"] == pytest.approx(2, rel=0.02)


def test_one_nan_makes_the_error_nan():
    found = errors(altered(lambda gradient: gradient.index_fill(0, torch.tensor([900]), math.nan)))
    assert math.isnan(found["keys"]) and not found["keys"] < trial.TOLERANCE


def test_documents_that_see_each_other_are_found():
    whole = ENDS[[0, -1]]
    found = errors(lambda query, key, value: attend(query, key, value, whole, query.shape[-1] ** -0.5))
    assert min(found.values()) > trial.TOLERANCE
