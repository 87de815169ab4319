"""Every check of the contract on every method and family."""

from __future__ import annotations

import pytest

from ivcp_eval.interface import Unsupported, registry
from tests.engine import tiny_models
from tests.engine.contract.cases import Case, all_cases, wanted
from tests.engine.contract.checks import CHECKS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_contract:
        every = metafunc.config.getoption("every_pair")
        pairs = [(name, case) for name in CHECKS for case in all_cases() if every or wanted(name, case)]
        metafunc.parametrize(("name", "case"), pairs, ids=[f"{name}-{case}" for name, case in pairs])


def test_contract(name: str, case: Case) -> None:
    try:
        with case.prune():
            pass
    except Unsupported as reason:
        pytest.skip(str(reason))
    CHECKS[name](case)


@pytest.mark.parametrize("family", registry.family_names())
def test_every_family_has_a_tiny_model(family: str) -> None:
    assert family in tiny_models.names(), (
        f"write tests/model_adapters/families/{family}.py; see tests/engine/tiny_models.py"
    )


@pytest.mark.parametrize("family", tiny_models.names())
def test_tiny_model_fits_the_contract(family: str) -> None:
    case = Case(family, "none")
    sizes = tiny_models.family(family).N_TOKENS
    assert family in registry.family_names()
    assert sizes[0] == max(sizes) >= 12
    assert len(case.text_model.layers) >= 6
    logits = case.forward(case.inputs("t5 i0 t9")).logits
    assert 0.3 < float(logits.std()) < 10, "errors would not show, or drown, in logits of this scale"
    other = case.forward(case.inputs("t5 i0 t9", seed=1)).logits
    assert float((logits - other).abs().mean()) > 0.1


@pytest.mark.parametrize("method", registry.method_names())
def test_every_method_runs_somewhere(method: str) -> None:
    for family in tiny_models.names():
        try:
            with Case(family, method).prune():
                return
        except Unsupported:
            continue
    pytest.fail(f"method {method!r} supports no family with a tiny model")


@pytest.mark.parametrize("family", tiny_models.names())
@pytest.mark.parametrize("method", ["none", "ivc_prune"])
def test_the_main_method_runs_everywhere(method: str, family: str) -> None:
    with Case(family, method).prune() as recording:
        assert recording.run.method
