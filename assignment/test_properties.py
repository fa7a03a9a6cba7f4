"""What the course asks for: a test for each property of each function.

python -m pytest assignment --solution FILE           all of them
python -m pytest assignment --solution FILE -k jsd    of one function
"""

import pytest

from assignment.grade import function_of
from assignment.problems import PROBLEMS, verify

CASES = [
    pytest.param(problem, check, id=f"{problem.name}-{check.__name__}")
    for problem in PROBLEMS
    for check in problem.properties
]


@pytest.mark.parametrize("problem, check", CASES)
def test_what_has_to_hold(problem, check, solution):
    verify(problem, check, function_of(solution, problem.name))
