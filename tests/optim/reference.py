"""An independent COSMOS in float64, loops and no sharing of code: what the algorithm's steps are compared with."""

from __future__ import annotations

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(x, steps=5, coefficients=QUINTIC):
    a, b, c = coefficients
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Reference:
    """One matrix. `basis` is U after the first step; None takes the singular vectors of the first gradient."""

    def __init__(self, w, *, eta, rank=8, b1=0.95, b2=0.95, b3=None, gamma=0.2, eps=1e-8, wd=0.0, nesterov=True,
                 inside=False, basis=None):  # fmt: skip
        self.w, self.eta, self.r = w.double().clone(), eta, min(rank, *w.shape)
        self.b1, self.b2, self.b3, self.gamma, self.eps = b1, b2, b2 if b3 is None else b3, gamma, eps
        self.wd, self.nesterov, self.inside, self.u = wd, nesterov, inside, basis
        self.m, self.v, self.t = torch.zeros_like(self.w), torch.zeros(w.shape[0], self.r).double(), 0

    def step(self, g):
        g, (rows, columns) = g.double(), self.w.shape
        self.t += 1
        self.m = self.b1 * self.m + g
        if self.t == 1:
            if self.u is None:
                self.u = torch.linalg.svd(g, full_matrices=False)[2][: self.r].T
            self.u = self.u.double()
            self.s = (1 - self.b3) * (g @ self.u).T @ (g @ self.u)
        else:
            y = self.b3 * self.u @ self.s + (1 - self.b3) * g.T @ (g @ self.u)
            q, r = torch.linalg.qr(y)
            new = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
            turn = self.u.T @ new
            self.s = self.b3 * turn.T @ self.s @ turn + (1 - self.b3) * (g @ new).T @ (g @ new)
            self.u = new
        self.v = self.b2 * self.v + (1 - self.b2) * (g @ self.u) ** 2
        c1, c2 = (1 - self.b1**self.t) / (1 - self.b1), 1 - self.b2**self.t
        h = (g + self.b1 * self.m) / (1 + self.b1 * c1) if self.nesterov else self.m / c1
        root = ((self.v + self.eps) / c2).sqrt() if self.inside else (self.v / c2).sqrt() + self.eps
        a = (h @ self.u / root) @ self.u.T
        rest = h - h @ self.u @ self.u.T
        b = torch.zeros_like(h)
        if rest.norm() > 1e-4 * h.norm():
            b = newton_schulz(rest if rows <= columns else rest.T)
            b = b if rows <= columns else b.T
        scale = (rows * columns) ** 0.5
        d = a + self.gamma * scale * b / (b.norm() + self.eps)
        self.w = (1 - self.eta * self.wd) * self.w - self.eta * scale * d / (d.norm() + self.eps)
