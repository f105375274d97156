"""SOAP against an independent one in float64, and what its state costs."""

from __future__ import annotations

import pytest
import torch

from adapt.optim.algorithms.soap import sides_of
from tests.optim.suites import close, gradients, steps, suite, weights

FULL = [(24, 24), (40, 24), (24, 40)]
"""Shapes whose preconditioners have full rank after two steps: the eigenvectors of a null space are anybody's."""


class Reference:
    """One matrix, as the paper's algorithms 3 and 4 (and the authors' code in its order); moments rotated when the
    basis turns. `bases` replaces those of the first step, which are not unique."""

    def __init__(self, w, *, lr, wd, b1=0.95, b2=0.95, b3=0.95, eps=1e-8, every=10, left=True, right=True):
        self.w, self.lr, self.wd, self.b1, self.b2, self.b3 = w.double().clone(), lr, wd, b1, b2, b3
        self.eps, self.every, self.left, self.right, self.t = eps, every, left, right, -1
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)
        rows, columns = w.shape
        self.l, self.r = torch.zeros(rows, rows).double(), torch.zeros(columns, columns).double()

    def _cov(self, g):
        self.l = self.b3 * self.l + (1 - self.b3) * g @ g.T
        self.r = self.b3 * self.r + (1 - self.b3) * g.T @ g

    def step(self, g):
        g = g.double()
        self.t += 1
        if self.t == 0:
            self._cov(g)
            self.ql = torch.linalg.eigh(self.l)[1].flip(1) if self.left else torch.eye(len(self.l)).double()
            self.qr = torch.linalg.eigh(self.r)[1].flip(1) if self.right else torch.eye(len(self.r)).double()
            return
        rotated = self.ql.T @ g @ self.qr
        self.m = self.b1 * self.m + (1 - self.b1) * rotated
        self.v = self.b2 * self.v + (1 - self.b2) * rotated**2
        first, second = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        # the authors' eps stands beside the uncorrected root
        update = first / (second.sqrt() + self.eps / (1 - self.b2**self.t) ** 0.5)
        self.w = (self.w - self.lr * self.ql @ update @ self.qr.T) * (1 - self.lr * self.wd)
        self._cov(g)
        if self.t % self.every == 0:
            plain = self.ql @ self.m @ self.qr.T
            if self.left:
                order = torch.diag(self.ql.T @ self.l @ self.ql).argsort(descending=True)
                self.ql, self.v = torch.linalg.qr(self.l @ self.ql[:, order])[0], self.v[order]
            if self.right:
                order = torch.diag(self.qr.T @ self.r @ self.qr).argsort(descending=True)
                self.qr, self.v = torch.linalg.qr(self.r @ self.qr[:, order])[0], self.v[:, order]
            self.m = self.ql.T @ plain @ self.qr


@pytest.mark.parametrize(
    ("fields", "left", "right"),
    [
        ({}, [1, 1, 1], [1, 1, 1]),
        ({"precondition_frequency": 3, "shampoo_beta": 0.9}, [1, 1, 1], [1, 1, 1]),
        ({"max_precond_dim": 30}, [1, 0, 1], [1, 1, 0]),
        ({"sides": "smaller"}, [0, 0, 1], [1, 1, 0]),
    ],
)
def test_thirty_steps_equal_the_reference(fields, left, right):
    """To 1e-3 of a step, given the same first basis."""
    ours = weights(FULL)
    optimizer = suite("soap", ours, lr=3e-3, weight_decay=0.1, **fields)
    every, b3 = fields.get("precondition_frequency", 10), fields.get("shampoo_beta", 0.95)
    theirs = [
        Reference(p.detach(), lr=3e-3, wd=0.1, every=every, b3=b3, left=bool(a), right=bool(b))
        for p, a, b in zip(ours, left, right, strict=True)
    ]
    for step in range(30):
        before = [one.w.clone() for one in theirs]
        for one, gradient in zip(theirs, gradients(ours, step), strict=True):
            one.step(gradient)
        steps(optimizer, step, step + 1)
        if step:
            assert close(ours, [one.w for one in theirs], before) < 1e-3
            continue
        for parameter, one, old in zip(ours, theirs, before, strict=True):
            assert torch.equal(parameter.detach(), old.float())  # the first step moves nothing, decay included
            for side, cov, basis in (("left", one.l, one.ql), ("right", one.r, one.qr)):
                if f"basis_{side}" in optimizer.state[parameter]:
                    made = optimizer.state[parameter][f"basis_{side}"]
                    turned = made.double().T @ cov @ made.double()
                    assert (turned - turned.diagonal().diag()).norm() < 1e-5 * cov.norm()
                    assert (turned.diagonal().diff() < 1e-5 * cov.norm()).all()
                    made.copy_(basis)


def test_bases_stay_orthonormal_and_preconditioners_symmetric():
    ours = weights()
    optimizer = suite("soap", ours, precondition_frequency=2)
    steps(optimizer, 0, 9)
    for state in optimizer.state.values():
        for side in ("left", "right"):
            basis, cov = state[f"basis_{side}"], state[f"cov_{side}"]
            assert (basis.T @ basis - torch.eye(len(basis))).abs().max() < 1e-5
            assert (cov - cov.T).abs().max() <= 1e-6 * cov.abs().max()


def test_state_is_moments_and_two_squares_a_side():
    ours = weights(FULL)
    for fields, expected in [
        ({}, lambda m, n: 2 * m * n + 2 * m * m + 2 * n * n),
        ({"sides": "smaller"}, lambda m, n: 2 * m * n + 2 * min(m, n) ** 2),
        ({"max_precond_dim": 10}, lambda m, n: 2 * m * n),
    ]:
        optimizer = suite("soap", ours, **fields)
        assert optimizer.state_bytes() == sum(4 * (expected(*p.shape) + 1) for p in ours)  # and the step


def test_sides():
    group = {"sides": "both", "max_precond_dim": 100}
    assert sides_of(10, 100, group) == ["left", "right"]
    assert sides_of(10, 101, group) == ["left"]
    assert sides_of(200, 101, group) == []
    assert sides_of(10, 10, group | {"sides": "smaller"}) == ["right"]
    assert sides_of(9, 10, group | {"sides": "smaller"}) == ["left"]
