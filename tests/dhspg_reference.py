"""OTOv2's update, slowly and literally from its formulas: one group after the other, plain Python, float64.

The paper's symbols: x the parameters of a group, d the base optimizer's direction (a d = x - x_half), a the learning
rate, lambda the penalty. (arXiv 2303.06862, Sec. 3.2; the salience is that of the release.)
"""

import math

import torch


class Group:
    """A group: (parameter, dimension, positions) triples, flattened on demand."""

    def __init__(self, parts):
        self.parts = parts

    def of(self, tensors):
        return torch.cat([tensors[n].index_select(dim, index).reshape(-1) for n, dim, index in self.parts])

    def write(self, tensors, flat):
        for n, dim, index in self.parts:
            piece = tensors[n].index_select(dim, index)
            tensors[n].index_copy_(dim, index, flat[: piece.numel()].view(piece.shape))
            flat = flat[piece.numel() :]


class Reference:
    """Paper mode around any torch optimizer of the same parameters."""

    def __init__(self, params, optimizer, groups, target, start, lam, amplify, hat, epsilon):
        self.params, self.optimizer, self.groups = params, optimizer, groups
        self.target, self.start, self.lam, self.amplify, self.hat, self.epsilon = (
            target,
            start,
            lam,
            amplify,
            hat,
            epsilon,
        )
        self.steps, self.redundant, self.zero = 0, [], set()

    @torch.no_grad()
    def step(self):
        self.steps += 1
        lr = self.optimizer.param_groups[0]["lr"]
        before = {n: p.detach().clone() for n, p in self.params.items()}
        self.optimizer.step()
        half = {n: p.detach().clone() for n, p in self.params.items()}
        direction = {n: (before[n] - half[n]) / lr for n in half}
        if self.steps == self.start:
            self.partition(before, direction)
        elif self.steps > self.start:
            for g in list(self.redundant):
                self.correct(g, before, half, direction, lr)
        for g in self.zero:
            flat = self.groups[g].of(self.params)
            self.groups[g].write(self.params, torch.zeros_like(flat))

    def partition(self, before, direction):
        cosines, inverses = [], []
        for group in self.groups:
            x, d = group.of(before), group.of(direction)
            norms = float(x.norm()) * float(d.norm())
            cosines.append(float(x @ d) / norms if norms else 0.0)
            inverses.append(1 / (float(x.norm()) / len(x) + 1e-6))
        c, i = math.sqrt(sum(v * v for v in cosines)), math.sqrt(sum(v * v for v in inverses))
        score = [0.5 * a / c + 0.5 * b / i for a, b in zip(cosines, inverses, strict=True)]
        self.redundant = sorted(range(len(score)), key=lambda g: -score[g])[: self.target]

    def correct(self, g, before, half, direction, lr):
        x, x_half, d = (self.groups[g].of(t) for t in (before, half, direction))
        norm, xd = float(x.norm()), float(x @ d)
        lam = self.lam
        if xd < 0:
            low = -xd / norm
            high = -float(d @ d) * norm / xd
            lam = min(max(self.amplify * low, self.lam), self.hat * self.lam)
            if lam >= high:
                lam = (low + high) / 2
        x_hat = x_half - lr * lam * x / norm
        if float(x_hat @ x) < self.epsilon * norm**2:
            x_hat = torch.zeros_like(x_hat)
            self.zero.add(g)
            self.redundant.remove(g)
        self.groups[g].write(self.params, x_hat)
