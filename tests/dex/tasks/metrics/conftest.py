import evaluations
import pytest


@pytest.fixture(scope="session")
def classified():
    return evaluations.classified


@pytest.fixture(scope="session")
def segmented():
    return evaluations.segmented
