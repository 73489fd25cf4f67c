import pytest

from ecodiff.config.ablations import AblationSettings
from ecodiff.config.sections import LearningRates, MaskSettings

BASE = MaskSettings(lr=LearningRates(heads=0.3, neurons=0.2), batch=7)


def points(**vary):
    found = AblationSettings(prompts="validation", sparsity=0.2, vary=vary).points(BASE)
    return {point.name: point for point in found}


def test_a_point_changes_one_key_of_the_models_own_settings():
    found = points(noise_floor=[0.0, 0.4], batch=[3])
    assert [*found] == ["default", "noise-floor-0.0", "noise-floor-0.4", "batch-3"]
    assert found["default"].settings == BASE
    assert found["noise-floor-0.4"].settings == BASE.model_copy(update={"noise_floor": 0.4})
    assert found["batch-3"].settings == BASE.model_copy(update={"batch": 3})
    assert {point.sparsity for point in found.values()} == {0.2}


def test_a_rate_is_that_of_all_kinds():
    found = points(lr=[0.5])["lr-0.5"].settings
    assert found.lr == LearningRates(heads=0.5, neurons=0.5, modulation=0.5)
    assert found.batch == 7


def test_what_is_learned_for_varies_too():
    found = points(sparsity=[0.1])["sparsity-0.1"]
    assert (found.sparsity, found.settings) == (0.1, BASE)


def test_values_that_the_section_does_not_allow_are_refused():
    with pytest.raises(ValueError, match="batch"):
        points(batch=[0])
