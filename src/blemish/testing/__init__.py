"""The contract of a method, as checks that a method from anywhere can be run through.

from blemish import testing
from blemish.detectors.registry import METHODS

METHODS["mine"] = MINE  # a Method, or "module:NAME"


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return testing.train(tmp_path_factory.mktemp("mine"), "mine", steps=50)


@pytest.mark.parametrize("check", testing.CHECKS)
def test_contract(check, subject, tmp_path):
    testing.CHECKS[check](subject, tmp_path)
"""

from blemish.testing.contract import CHECKS
from blemish.testing.subject import Subject, train

__all__ = ["CHECKS", "Subject", "train"]
