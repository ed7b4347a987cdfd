"""Queries that the study compares beside model.py's three: python -m study.queries CONFIG ... is train.py with them."""

from model import QUERIES, LinearQuery
from train import main
from utils.settings import run_program


class MatchedLinearQuery(LinearQuery):
    """The linear query, but q starts as large as the nonlinear one: x and f(x) have variance 1, so their mean has 1/2."""

    def __init__(self, config):
        super().__init__(config)
        self.w_q.init_std = (2 * config.n_embd) ** -0.5


QUERIES["linear_matched"] = MatchedLinearQuery

if __name__ == "__main__":
    run_program(main)
