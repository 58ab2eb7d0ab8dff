import pytest

from optim_rules import RULES, MakeRule


@pytest.fixture(params=RULES)
def rule_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_rule(rule_name: str) -> MakeRule:
    return RULES[rule_name]
