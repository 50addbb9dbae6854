"""Scaling laws: train sizes x token budgets, fit L(N, D) = E + A / N^alpha + B / D^beta, and spend a budget well.

    python scripts/scaling_laws.py                                        minutes on a CPU
    python scripts/scaling_laws.py --sizes 32,64,128 --steps 200,800,3200 data=shakespeare_char
    python scripts/scaling_laws.py --fit-only sweeps/A sweeps/B --flops 1e15

N: parameters without position embeddings. D: tokens trained on. L: last validation loss. Every budget is a run with its own
cosine (Hoffmann et al. 2022, section 3). A killed study resumes by the same command. The fit is theirs (appendix D.3): Huber
loss of log L, L-BFGS from the best points of a grid; Huber's delta is 3 standard deviations of the residuals.
"""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

NAMES = ("E", "A", "B", "alpha", "beta")
FIXED = ["model.n_layer=2", "model.n_head=2", "data.batch_size=16", "optim.lr=3e-3", "optim.min_lr=3e-4", "logger=csv",
         "trainer.val_every=1000000", "trainer.log_every=50", "~callbacks.sample_text"]  # fmt: skip
EXPONENTS = (0.01, 4.0)  # where alpha and beta are looked for


class Law(NamedTuple):
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def optimal_size(self, flops: np.ndarray) -> np.ndarray:
        """The N of the lowest loss where 6 N D = flops; also for arrays of constants."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return G * (flops / 6) ** (self.beta / (self.alpha + self.beta))


def fit(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> tuple[Law, float]:
    """The law for runs (m,), and Huber's delta, in log L."""
    log_n, log_d, y = np.log(n), np.log(d), np.log(loss)
    u, v = log_n - log_n.mean(), log_d - log_d.mean()  # so that factors and exponents hardly correlate

    def terms(theta: np.ndarray) -> np.ndarray:  # logs of the three terms
        e, a, b, alpha, beta = theta[..., None]
        return np.stack((e + 0 * u, a - alpha * u, b - beta * v))

    def objective(theta: np.ndarray, delta: float) -> tuple[float, np.ndarray]:
        logs = terms(theta)
        total = np.logaddexp.reduce(logs)
        slope = np.clip(total - y, -delta, delta) * np.exp(logs - total)
        gradient = [*slope.sum(axis=1), -slope[1] @ u, -slope[2] @ v]
        return special.huber(delta, total - y).sum() / delta**2, np.array(gradient) / delta**2

    def descend(start: np.ndarray, delta: float) -> optimize.OptimizeResult:
        options = {"maxiter": 500, "ftol": 1e-12}
        return optimize.minimize(objective, start, (delta,), "L-BFGS-B", jac=True, options=options)

    lowest, exponents = np.log(loss.min()), (0.1, 0.25, 0.5, 1.0)
    grid = np.array([*itertools.product(lowest + np.log((0.3, 0.6, 0.9)), *2 * [lowest + np.log((0.03, 0.1, 0.3))],
                                        exponents, exponents)])  # fmt: skip
    distance = np.abs(np.logaddexp.reduce(terms(grid.T)) - y).sum(axis=1)
    best = min((descend(start, 1e-3) for start in grid[np.argsort(distance)[:3]]), key=lambda found: found.fun)
    residuals = np.sort(np.abs(np.logaddexp.reduce(terms(best.x)) - y))[len(best.x) :]  # that fit meets some exactly
    delta = max(3 * np.median(residuals) / stats.norm.ppf(0.75), 1e-6)
    e, a, b, alpha, beta = descend(best.x, delta).x
    factors = np.exp((a + alpha * log_n.mean(), b + beta * log_d.mean()))
    return Law(np.exp(e).round(9), *factors, alpha, beta), delta


def intervals(n: np.ndarray, d: np.ndarray, loss: np.ndarray, law: Law, delta: float, flops: float) -> dict[str, tuple]:
    """Intervals that hold all five constants at once with a probability of 95 %; of the optimal size N for `flops`, too.

    Profile likelihood (Bates & Watts 1988, chapter 6): with alpha and beta given, the law is linear in E, A and B. So over a
    grid of exponents the lowest sum of squares is exact, and the interval of a constant holds the values with which that sum
    can stay below a threshold, by Student's t and Bonferroni for five. Runs that the fit treats as outliers keep the weight
    that Huber's loss gave them.
    """
    predicted = law.loss(n, d)
    weight = np.minimum(1, delta / np.maximum(np.abs(np.log(loss / predicted)), 1e-12)) ** 0.5 / predicted
    freedom, points = len(loss) - len(NAMES), 80
    t = stats.t.ppf(1 - 0.05 / 2 / len(NAMES), freedom)
    ranges, lowest = [EXPONENTS, EXPONENTS], np.inf
    for _ in range(3):  # the whole plane, then closer
        alpha, beta = (axis.ravel() for axis in np.meshgrid(*(np.geomspace(*ends, points) for ends in ranges)))
        A_terms, B_terms = (n / n.min()) ** -alpha[:, None], (d / d.min()) ** -beta[:, None]
        X = np.stack((np.ones_like(A_terms), A_terms, B_terms), -1) * weight[:, None]
        E, factors, variance, free_rss, rss = least_squares(X, weight * loss)
        lowest = min(lowest, rss.min())
        if lowest == np.inf:
            sys.exit("error: no such law fits, as loss does not fall with both N and D; train larger and longer runs")
        near = rss <= lowest * (1 + t**2 / freedom)
        for i, axis in enumerate((alpha, beta)):
            step = (ranges[i][1] / ranges[i][0]) ** (1 / (points - 1))
            ranges[i] = (max(axis[near].min() / step, EXPONENTS[0]), min(axis[near].max() * step, EXPONENTS[1]))
    alpha, beta, room = alpha[near], beta[near], lowest * (1 + t**2 / freedom)
    A, B = (factors[near] * np.stack((n.min() ** alpha, d.min() ** beta), 1)).T
    halves = np.sqrt(variance[near] * (room - np.stack((free_rss, rss, rss), 1)[near]))
    found = {"E": (max((E[near] - halves[:, 0]).min(), 0), (E[near] + halves[:, 0]).max())}
    relative = halves[:, 1:] / factors[near]
    for name, values, half in (("A", A, relative[:, 0]), ("B", B, relative[:, 1])):
        found[name] = (max((values * (1 - half)).min(), 0), (values * (1 + half)).max())
    for name, (low, high) in zip(("alpha", "beta"), ranges, strict=True):
        found[name] = (low if low > EXPONENTS[0] else 0, high if high < EXPONENTS[1] else np.inf)
    spread = np.exp(np.hypot(*relative.T) / (alpha + beta))  # of A / B
    best = Law(0, A, B, alpha, beta).optimal_size(flops)
    return found | {"N": ((best / spread).min(), (best * spread).max())}


def least_squares(X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Fits of y (m,) to each X (K, m, 3): E (K,), then A and B (K, 2) if E may not be negative, the variances of all three for
    noise of 1 (K, 3), the sum of squares (K,), and the same if E may not be negative; infinite where A or B would be."""
    covariance = np.linalg.pinv(X.transpose(0, 2, 1) @ X, hermitian=True)
    factors = (covariance @ (X.transpose(0, 2, 1) @ y)[..., None])[..., 0]
    free_rss = (((X @ factors[..., None])[..., 0] - y) ** 2).sum(axis=1)
    E, variance = factors[:, 0], np.einsum("kii->ki", covariance)
    below, follow = np.minimum(E, 0), covariance[:, 1:, 0] / variance[:, :1]  # E = 0, and what A and B do for it
    rss = free_rss + below**2 / variance[:, 0]
    factors = factors[:, 1:] - below[:, None] * follow
    held = variance[:, 1:] - (below < 0)[:, None] * follow**2 * variance[:, :1]
    rss = np.where((factors > 0).all(axis=1), rss, np.inf)
    return E, factors, np.concatenate((variance[:, :1], held), axis=1), free_rss, rss


def train(out: Path, sizes: str, steps: str, overrides: list[str]) -> None:
    """Train the grid as one sweep in `out`, or resume it."""
    new = ["-m", *FIXED, *overrides, f"model.n_embd={sizes}", f"trainer.max_steps={steps}", f"hydra.sweep.dir={out}"]
    arguments = [f"resume={out}"] if (out / "sweep.json").exists() else new
    print(f"python -m gptlab.train {' '.join(arguments)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "gptlab.train", *arguments]).returncode
    if status not in (0, 1):  # 1: a job failed, and the others count
        sys.exit(status)


def read_runs(folders: list[Path]) -> np.ndarray:
    """(N, D, L) of each finished run in run and sweep folders."""
    from gptlab import checkpoint
    from gptlab.errors import UserError
    from gptlab.run import Run, find_checkpoint

    rows, data = [], set()
    for path in sorted(path.parent for folder in folders for path in folder.glob("**/run.json")):
        try:
            summary, config = Run(path).read_summary() or {}, Run(path).read_config()
            loss = summary.get("last", {}).get("val/loss")
            if loss is None:
                raise UserError("not finished, or diverged")
            if config["optim"]["schedule"] == "cosine" and config["optim"]["decay_steps"] != summary["steps"]:
                raise UserError("the cosine of its learning rate does not end with it")
            weights = checkpoint.read(find_checkpoint(str(path)), mmap=True)["state_dict"]
            n = sum(weights[name].numel() for name in weights if not name.endswith(("wpe.weight", "lm_head.weight")))
            tokens = summary["steps"] * config["data"]["batch_size"] * config["data"]["block_size"]
            rows.append((n, tokens, loss))
            data.add(summary["data"]["sha256"])
        except (UserError, KeyError, TypeError, AttributeError) as error:
            print(f"left out: {path}: {error}")
    if len(data) > 1:
        sys.exit("error: the runs were trained on different data; fit those of one data set")
    if len(rows) < 8 or min(len({row[i] for row in rows}) for i in (0, 1)) < 3:
        sys.exit(f"error: {len(rows)} finished runs; five constants need at least 8, of 3 sizes and 3 budgets")
    return np.array(rows, dtype=float).T


def plot(out: Path, n: np.ndarray, d: np.ndarray, loss: np.ndarray, law: Law) -> None:
    """Loss over compute, with the law's curve of each size and its lower envelope; and measurement against fit."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), dpi=130, layout="constrained")
    sizes = np.unique(n)
    for size, color in zip(sizes, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(sizes))), strict=True):
        own = n == size
        tokens = np.geomspace(d.min() / 1.5, d.max() * 1.5, 100)
        left.plot(6 * size * tokens, law.loss(size, tokens), color=color, linewidth=1)
        left.plot(6 * size * d[own], loss[own], "o", color=color, markersize=5, label=f"{size:,.0f}")
        fitted = law.loss(size, d[own])
        right.plot(fitted, 100 * (loss[own] / fitted - 1), "o", color=color, markersize=5)
    flops = np.geomspace(6 * (n * d).min() / 1.5, 6 * (n * d).max() * 1.5, 100)
    best = law.optimal_size(flops)
    left.plot(flops, law.loss(best, flops / 6 / best), "k--", linewidth=1.2, label="compute-optimal")
    left.set(xscale="log", xlabel="training FLOPs (6 N D)", ylabel="validation loss (nats per token)")
    left.set_title(f"L = {law.E:.3g} + {law.A:.3g} / N^{law.alpha:.3g} + {law.B:.3g} / D^{law.beta:.3g}", loc="left", fontsize=10)  # fmt: skip
    left.legend(frameon=False, title="N", alignment="left", fontsize=8)
    right.axhline(0, color="k", linewidth=0.8)
    right.set(xlabel="loss of the fit (nats per token)", ylabel="measured above fit (%)")
    for axes in (left, right):
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="more settings of gptlab.train")
    parser.add_argument("--sizes", default="12,24,48,96", help="model.n_embd, even numbers; default: %(default)s")
    parser.add_argument("--steps", default="100,200,400,800,1600", help="trainer.max_steps; default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("sweeps/scaling_laws"), help="folder of the sweep and the picture"
    )
    parser.add_argument(
        "--fit-only", nargs="+", type=Path, metavar="FOLDER", help="train nothing; fit these runs and sweeps"
    )
    parser.add_argument("--flops", type=float, help="training budget to spend; default: ten times the largest run's")
    options = parser.parse_intermixed_args()
    if options.flops is not None and not 0 < options.flops < np.inf:
        parser.error("--flops must be > 0")
    if missing := [folder for folder in options.fit_only or () if not folder.is_dir()]:
        parser.error(f"--fit-only: no folder {missing[0]}")
    if not options.fit_only:
        train(options.out, options.sizes, options.steps, options.overrides)
    n, d, loss = read_runs(options.fit_only or [options.out])
    flops = options.flops or 60 * (n * d).max()
    law, delta = fit(n, d, loss)
    found = intervals(n, d, loss, law, delta, flops)
    print(f"\nL(N, D) = E + A / N^alpha + B / D^beta, from {len(loss)} runs; intervals: 95 % for all five at once")
    for name in NAMES:
        print(f"  {name:6}{getattr(law, name):12.4g}   [{found[name][0]:.4g}, {found[name][1]:.4g}]")
    deviations = np.abs(loss / law.loss(n, d) - 1)
    print(f"  measured loss differs from the fit by {deviations.mean():.2%} on average, {deviations.max():.2%} at most")
    best = law.optimal_size(flops)
    print(f"\n{flops:.3g} FLOPs, well spent: {best:,.0f} parameters [{found['N'][0]:,.0f}, {found['N'][1]:,.0f}] on "
          f"{flops / 6 / best:,.0f} tokens, for a loss of {law.loss(best, flops / 6 / best):.4g}")  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    plot(options.out / "scaling_laws.png", n, d, loss, law)
    print(f"picture: {options.out / 'scaling_laws.png'}")


if __name__ == "__main__":
    main()
