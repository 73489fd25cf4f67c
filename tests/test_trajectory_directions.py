"""Directions of a linear's input: the best fit of a rank, and what bases are computed from."""

import pytest
import torch
from tiny import calibrated, tiny
from torch import nn

from ecodiff.calibrate import Calibration
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.directions import bases_of, basis_of, conditioned


def rows(count=200, size=8):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(size, size, generator=generator) * 0.5 ** torch.arange(size)[:, None]
    return torch.randn(count, size, generator=generator) @ mixed + 3.0


def moments(x):
    linear = nn.Linear(x.shape[1], 1)
    with conditioned(nn.ModuleDict({"a": linear}), ["a"]) as found:
        for part in x.split(64):
            linear(part)
    return found["a"]


@pytest.mark.parametrize("outputs", [5, 8, 30])
@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_the_first_directions_are_the_best_fit_of_that_rank(outputs, rank):
    """Eckart and Young: the error left is the rest of the singular values of W X, X centred."""
    x, weight = rows(), torch.randn(outputs, 8)
    basis = basis_of(weight, moments(x))
    gate = (torch.arange(8) < rank).float()
    error = (basis.gated(x, gate) - x) @ weight.T
    strengths = torch.linalg.svdvals((x - x.mean(0)) @ weight.T)
    torch.testing.assert_close(error.norm(), strengths[rank:].norm(), rtol=2e-3, atol=1e-3)


def test_open_gates_change_nothing_to_the_bit():
    x = rows()
    assert torch.equal(basis_of(torch.randn(5, 8), moments(x)).gated(x, torch.ones(8)), x)


def test_inputs_without_any_spread_have_a_basis():
    basis = basis_of(torch.randn(5, 8), moments(torch.ones(10, 8)))
    assert basis.read.isfinite().all() and basis.write.isfinite().all()
    torch.testing.assert_close(basis.mean, torch.ones(8))


def test_moments_are_shared_until_inputs_differ():
    model = nn.ModuleDict({n: nn.Linear(4, 1) for n in "abc"})
    first, other = torch.randn(2, 3, 4)
    with conditioned(model, "abc") as found:
        for name, x in {"a": first, "b": first, "c": first}.items():
            model[name](x)
        for name, x in {"a": first, "b": first, "c": other}.items():
            model[name](x)
    assert found["a"] is found["b"]
    for name, last in (("a", first), ("c", other)):
        x = nn.functional.pad(torch.cat([first, last]).double(), (0, 1), value=1.0)
        torch.testing.assert_close(found[name], x.T @ x)


def test_all_of_flux_reads_one_vector_and_the_file_holds_it_once(tmp_path):
    _, calibration = calibrated("flux")
    assert len({id(value) for value in calibration.moments.values()}) == 1
    calibration.save(tmp_path / "record.safetensors")
    again = Calibration.load(tmp_path / "record.safetensors").moments
    assert again.keys() == calibration.moments.keys()
    assert len({id(value) for value in again.values()}) == 1
    assert all(torch.equal(again[name], value) for name, value in calibration.moments.items())


def test_a_record_without_moments_is_refused():
    pipe = tiny("flux")
    with pytest.raises(UserError, match=r"no moments of transformer_blocks.0.norm1.linear"):
        bases_of(denoiser_of(pipe), discover(pipe, "rank"), {})


def test_fewer_rows_than_directions_is_a_warning(caplog):
    calibrated("flux")
    assert (
        "read more directions than there are rows (transformer_blocks.0.norm1.linear: 6 for 48)"
        in caplog.text
    )
