"""relay.py: masked diffusion whose steps hand on what they were thinking.

(Relay representations, Rozonoyer et al., arXiv 2605.22967.) A masked diffusion model fills in what
is masked, some cells in each pass, in any order. Between two passes it forgets all but the cells
filled in: each pass thinks from scratch. The relay adds the last pass's hidden states h to the
next pass's input, and training runs through two passes, so that the second teaches the first what
to hand on:

    logits, h'  =  f( Emb(canvas) + norm(h) )                        h = 0 on a fresh board
    loss        =  CE(pass 1) + CE(pass 2), on the masked cells, gradient through h'

After a pass the surest cells are filled in: in the order of doubt, 1 - max p, as long as the doubts
add up to less than eta, and at least one. At test time with the model's own digits; in training
with the right ones, on boards that stay in a buffer until they are full. The number of passes is
the time that an answer takes, and eta trades it for accuracy.

The arms, each with as many passes and boards in training:

    plain                 masked diffusion (MDLM, Sahoo et al., arXiv 2406.07524): t ~ U(0, 1), each
                          blank is masked with probability t; E[CE of the masked / t] is an upper
                          bound of -log p(solution). Its own sampler unmasks at random times
    rollout buffer        canvases as the rule leaves them, two passes each, nothing handed on
    relay, no gradient    h is handed on, but the second pass does not teach the first
    relay

The task is 6 x 6 Sudoku (tasks/sudoku.py). The four heads of the transformer see the cell's row,
column, box, and the whole board.

    python -m electives.relay                   2 minutes on two cores
    python -m electives.relay --seeds 3         what results/ holds

What to see: at 4 passes the relay solves more boards than the rollout buffer, because it is as sure
half a pass earlier. Most of this comes without the gradient: what a model thinks of a cell that it
leaves masked is in its h anyway, and the next pass has learnt to read it. The plain arm is as good
as the rollout buffer, or stays on a plateau: that depends on the seed.

How this differs from the paper:
1. 6 x 6 boards, one layer and 48,000 parameters; there larger boards, and a language model of 1.5
   billion.
2. Digits are renamed at random whenever a board is used; each head sees one kind of unit, and no
   cell has a position. The paper's transformer has to find the units.
3. RMSNorm in the place of LayerNorm; MDLM without its EMA and dropout, and with noise t itself.
"""

import random
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from experiment import (
    Flags,
    Run,
    band,
    claim,
    command,
    descend,
    flag,
    parse_args,
    pick_device,
    seeds_of,
)
from meter import Meter, spend
from model import GPT, GPTConfig, RMSNorm
from tasks.sudoku import BOX, CELLS, COLUMN, ROW, N, draw

SOURCE = "Rozonoyer et al., arXiv 2605.22967"
MDLM = "Sahoo et al., arXiv 2406.07524"
MASK = 0
ARMS = {  # name: trains on its own rollouts, hands on h, with its gradient
    "plain": (False, False, False),
    "rollout buffer": (True, False, False),
    "relay, no gradient": (True, True, False),
    "relay": (True, True, True),
}
OWN = "plain, own sampler"
ETAS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.8)  # of the curves
PASSES = (2, 4, 8, 16)  # of the plain arm's own sampler
EQUAL = 4  # passes at which the arms are compared
GOAL = 0.9  # boards solved, at which passes are
WIDTH = 64


@dataclass
class Config(Flags):
    steps: int = flag(600, "training steps, of two passes each", quick=3, low=1)
    batch: int = flag(64, "boards a step", quick=8, low=2)
    lr: float = flag(8e-3, "learning rate (up in 50 steps, then linear to 0)", low=0)
    eta: float = flag(0.15, "doubt that a pass of training may fill in", low=0)
    layers: int = flag(1, "layers of the transformer", low=1)
    givens: int = flag(16, "digits given of 36", quick=30, low=10, high=35)
    boards: int = flag(3000, "boards to train on", quick=20, low=1)
    test: int = flag(1000, "held-out boards", quick=10, low=3)


# --------------------------------------------------------------------------------------------------
# The model


class Denoiser(nn.Module):
    """A transformer over all cells at once, from which h comes and to which it returns."""

    def __init__(self, layers):
        super().__init__()
        shape = GPTConfig(N + 1, CELLS, layers, n_head=4, n_embd=WIDTH, qk_norm=True, tie=False)
        self.gpt = GPT(shape)
        # a weight of 0 at first: the model before training is the one without a relay
        self.relay_norm = RMSNorm(WIDTH, shape.norm_eps)
        nn.init.zeros_(self.relay_norm.weight)
        # what each head sees (1, H, 36, 36): the cell's row, its column, its box, all
        units = [torch.from_numpy(unit[:, None] == unit) for unit in (ROW, COLUMN, BOX)]
        sees = torch.stack((*units, torch.ones_like(units[0])))
        self.register_buffer("sees", sees[None], persistent=False)
        # no positions, then, and no rotations
        unturned = torch.ones(1, 1, shape.head_dim // 2, dtype=torch.complex64)
        self.register_buffer("unturned", unturned, persistent=False)

    def forward(self, canvas, h):
        """canvas (B, 36), h (B, 36, C) -> logits of the digits 1 to 6 (B, 36, 6), the next h.

        MASK has no logit: it is never predicted.
        """
        x = self.gpt.wte(canvas) + self.relay_norm(h)  # (B, 36, C)
        spend(self.gpt.config.flops(len(x), CELLS, CELLS))
        for block in self.gpt.blocks:
            x = block(x, self.unturned, mask=self.sees)
        return self.gpt.lm_head(self.gpt.norm(x))[..., 1:], x


def nothing(canvas):
    """The h of fresh boards."""
    return torch.zeros(*canvas.shape, WIDTH, device=canvas.device)


def cross_entropy(logits, solution):
    """-log p of the right digits: logits (B, 36, 6), solution (B, 36) -> (B, 36)."""
    return F.cross_entropy(logits.transpose(1, 2), solution - 1, reduction="none")


# --------------------------------------------------------------------------------------------------
# Plain masked diffusion


def noised(board, solution, generator):
    """The solution, of which each cell that is not given is masked with probability t
    -> canvas (B, 36), t (B,).

    The t of a batch are spread evenly over (0.001, 1), behind one random offset: less noise in the
    loss than B independent ones.
    """
    B = len(solution)
    u = (torch.rand((), generator=generator) + torch.arange(B) / B) % 1
    t = 1e-3 + (1 - 1e-3) * u
    masked = torch.rand(solution.shape, generator=generator) < t[:, None]
    masked = masked.to(solution.device) & (board == MASK)
    return solution.masked_fill(masked, MASK), t.to(solution.device)


def bound(loss, canvas, board, t):
    """The upper bound of -log p(solution), nats per blank (B,). loss (B, 36): cross-entropies.

    Of a cell that is masked with probability t, 1 / t makes every order in which the cells could be
    filled in, one by one, count the same.
    """
    masked = canvas == MASK
    return (loss * masked).sum(1) / t / (board == MASK).sum(1)


@torch.no_grad()
def ancestral(model, board, steps, generator):
    """MDLM's sampler. Time runs from 1 to 0; from t to s, a masked cell stays so with probability
    s / t, else its digit is drawn -> the full boards (B, 36).
    """
    canvas = board
    for i in range(steps, 0, -1):
        logits, _ = model(canvas, nothing(canvas))
        p = logits.softmax(-1).cpu()
        drawn = p.flatten(0, 1).multinomial(1, generator=generator).view(canvas.shape) + 1
        stays = torch.rand(canvas.shape, generator=generator) < (i - 1) / i
        chosen = (canvas == MASK) & ~stays.to(canvas.device)
        canvas = torch.where(chosen, drawn.to(canvas.device), canvas)
    return canvas


# --------------------------------------------------------------------------------------------------
# The relay


def reveal(logits, masked, eta):
    """Which masked cells to fill in (B, 36): those with the least doubt, as long as the doubts add
    up to less than eta; one at least where any is masked.
    """
    doubt = 1 - logits.softmax(-1).amax(-1)
    doubt, order = doubt.masked_fill(~masked, torch.inf).sort(1)  # (B, 36)
    chosen = doubt.cumsum(1) < eta
    chosen[:, 0] = True
    return torch.zeros_like(masked).scatter(1, order, chosen) & masked


def two_passes(model, canvas, solution, h, eta, relays, gradient):
    """Training's rollout -> the loss, and canvas and h after it. The right digits are filled in."""
    loss = 0
    for _ in range(2):
        masked = canvas == MASK
        logits, after = model(canvas, h)
        loss = loss + (cross_entropy(logits, solution) * masked).sum() / masked.sum().clamp_min(1)
        canvas = torch.where(reveal(logits.detach(), masked, eta), solution, canvas)
        if relays:
            h = after if gradient else after.detach()
    return loss, canvas, h.detach()


@torch.no_grad()
def solve(model, board, relays, eta):
    """Fill in boards (B, 36) -> the full boards, and in which pass each cell was filled in, 0 for
    those given (B, 36).
    """
    canvas, h, when = board.clone(), nothing(board), torch.zeros_like(board)
    passes = 0
    live = torch.arange(len(board), device=board.device)  # the boards that are not full
    while len(live):
        passes += 1
        now = canvas[live]
        logits, after = model(now, h[live])
        chosen = reveal(logits, now == MASK, eta)
        now = torch.where(chosen, logits.argmax(-1) + 1, now)
        canvas[live] = now
        when[live] = when[live].masked_fill(chosen, passes)
        if relays:
            h[live] = after
        live = live[(now == MASK).any(1)]
    return canvas, when


# --------------------------------------------------------------------------------------------------
# Training


def boards(rng, n, givens, held_out=False):
    """n boards and their solutions (n, 36) each."""
    pairs = [draw(rng, givens, held_out) for _ in range(n)]
    return torch.tensor(pairs).unbind(1)


def renamed(board, solution, generator):
    """The same boards with other names for the digits, other ones in each."""
    names = 1 + torch.rand((len(board), N), generator=generator).argsort(1)
    names = F.pad(names, (1, 0), value=MASK)  # (B, 7): what is masked stays so
    return names.gather(1, board), names.gather(1, solution)


def train(config, run, arm, seed, pool, device):
    """One arm -> its model."""
    torch.manual_seed(seed)
    model = Denoiser(config.layers).to(device)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    rollout, relays, gradient = ARMS[arm]
    B = config.batch

    def fresh(n):
        rows = torch.randint(len(pool[0]), (n,), generator=generator)
        return [x.to(device) for x in renamed(pool[0][rows], pool[1][rows], generator)]

    # The buffer begins with boards that are more or less full: all fresh, they would stay in step
    board, solution = fresh(B)
    canvas, _ = noised(board, solution, generator)
    kept = dict(
        canvas=canvas,
        solution=solution,
        h=nothing(canvas),
    )
    for step in run.loop(f"{arm} {seed}", config.steps, model, optimizer, rng, generator, kept):
        left = 1 - step / config.steps
        optimizer.param_groups[0]["lr"] = config.lr * min((step + 1) / 50, left)
        if rollout:
            canvas, solution, h = kept.values()
            # full boards make room, and what was thought of them goes, too
            full = (canvas != MASK).all(1)
            canvas[full], solution[full] = fresh(int(full.sum()))
            h[full] = 0
            loss, kept["canvas"], kept["h"] = two_passes(
                model,
                canvas,
                solution,
                h,
                config.eta,
                relays=relays,
                gradient=gradient,
            )
        else:
            # as many boards: the others see each of theirs in two passes
            board, solution = fresh(2 * B)
            canvas, t = noised(board, solution, generator)
            logits, _ = model(canvas, nothing(canvas))
            loss = bound(cross_entropy(logits, solution), canvas, board, t).mean()
        optimizer.zero_grad()
        loss.backward()
        descend(optimizer, loss)
        if step % 50 == 0 or step + 1 == config.steps:
            run.log(phase="train", arm=arm, seed=seed, step=step, loss=loss.item())
            run.say(loss=loss.item())
    return model


def measure(model, relays, test, eta):
    """How many boards are solved, and in how many passes in the mean."""
    meter = Meter()
    filled, when = solve(model, test[0], relays, eta)
    right = (filled == test[1]).all(1)
    passes = when.amax(1)
    return dict(
        accuracy=right.float().mean().item(),
        passes=passes.float().mean().item(),
        **meter.solved(right.sum()),
    )


@torch.no_grad()
def own(model, test, steps):
    """The same for the sampler that belongs to the bound."""
    generator = torch.Generator().manual_seed(0)
    meter = Meter()
    right = (ancestral(model, test[0], steps, generator) == test[1]).all(1)
    return dict(accuracy=right.float().mean().item(), passes=steps, **meter.solved(right.sum()))


def picture(model, relays, test, eta):
    """How one board is filled in: the digits, the passes that they came in, the right ones."""
    filled, when = solve(model, test[0][:1], relays, eta)
    return dict(
        digits=filled[0].tolist(),
        when=when[0].tolist(),
        right=test[1][0].tolist(),
    )


def evaluate(config, run, arm, seed, model, test):
    """Log the curve of a model, and the board that the figure shows."""
    relays = ARMS[arm][1]
    where = dict(seed=seed, step=config.steps)
    for eta in ETAS:
        of_eta = partial(measure, model, relays, test, eta)
        run.log_once(of_eta, phase="curve", arm=arm, eta=eta, **where)
    if arm == "plain":
        for n in PASSES:
            run.log_once(partial(own, model, test, n), phase="curve", arm=OWN, n=n, **where)
    show_it = partial(picture, model, relays, test, config.eta)
    run.log_once(show_it, phase="picture", arm=arm, **where)


# --------------------------------------------------------------------------------------------------
# The figure


def curve(run, arm):
    """Passes and accuracy of an arm, the fewest passes first (seeds, points) each."""
    points = {}
    for row in run.rows:
        if row["phase"] == "curve" and row["arm"] == arm:
            points.setdefault(row["seed"], []).append((row["passes"], row["accuracy"]))
    in_order = [sorted(points[seed]) for seed in sorted(points)]
    return np.array(in_order).transpose(2, 0, 1)


def between(x, y, at):
    """y where x is `at`, between two points (seeds, points) -> (seeds,). Left of the first point
    its y, which flatters an arm that needs more passes; nan right of the last.
    """
    y_at = [
        np.interp(at, a, b, right=np.nan)
        for a, b in zip(np.maximum.accumulate(x, axis=1), y, strict=True)
    ]
    return np.array(y_at)


def show(ax, row):
    """A board, each cell in the colour of the pass that filled it in -> the image."""
    when = np.ma.masked_equal(row["when"], 0).reshape(N, N)  # what is given stays white
    image = ax.imshow(when, cmap="viridis_r", vmin=1, vmax=6, alpha=0.6)
    for cell, digit in enumerate(row["digits"]):
        wrong = digit != row["right"][cell]
        ax.text(
            COLUMN[cell],
            ROW[cell],
            digit,
            ha="center",
            va="center",
            fontsize=14,
            color="red" if wrong else "black",
            weight="normal" if row["when"][cell] else "bold",
        )
    ax.hlines((1.5, 3.5), -0.5, 5.5, color="black")
    ax.vlines(2.5, -0.5, 5.5, color="black")
    ax.set(xlabel="column", ylabel="row", xticks=[], yticks=[])
    return image


def figure(config, run):
    """The figure and its claims, from the rows of the run."""
    fig, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained", width_ratios=(1.5, 1, 1))
    frontier = axes[0]
    at = {}  # accuracy at EQUAL passes
    needs = {}  # passes to solve a share GOAL
    for arm, color in zip((*ARMS, OWN), ("C7", "C1", "C2", "C0", "C7"), strict=True):
        passes, accuracy = curve(run, arm)  # (seeds, points)
        at[arm] = between(passes, accuracy, EQUAL)  # (seeds,)
        needs[arm] = between(accuracy, passes, GOAL)
        band(
            frontier,
            passes.mean(0),
            accuracy,
            arm,
            color=color,
            marker="o",
            ms=4,
            ls="--" if arm == OWN else "-",
        )
    frontier.axvline(EQUAL, color="black", lw=0.5)
    frontier.set_title(
        f"Solved in {EQUAL} passes: relay {at['relay'].mean():.2f}, without gradient "
        f"{at['relay, no gradient'].mean():.2f}, without relay {at['rollout buffer'].mean():.2f}"
    )
    frontier.set_xlabel("forward passes (mean of the boards)")
    frontier.set_ylabel("boards solved (fraction)")
    frontier.set(xlim=(1, 10), ylim=(0, 1.02))
    frontier.legend()

    for ax, arm in zip(axes[1:], ("rollout buffer", "relay"), strict=True):
        row = next(r for r in run.rows if r["phase"] == "picture" and r["arm"] == arm)
        mistakes = sum(a != b for a, b in zip(row["digits"], row["right"], strict=True))
        image = show(ax, row)
        ax.set_title(f"{arm}: full after {max(row['when'])} passes, mistakes: {mistakes}")
    fig.colorbar(image, ax=axes[1:], label="pass that filled in the cell (bold: given)")
    return fig, judge(config.seeds, at, needs)


def judge(n, at, needs):
    """The claims: differences on the same seeds."""
    ours = at["relay"]
    without = at["rollout buffer"]
    idle = at["relay, no gradient"]
    order = at["plain"] - at[OWN]
    share = needs["relay"] / needs["rollout buffer"]
    text = f"solved in {EQUAL} passes: "
    return [
        claim(
            "relay",
            text + "relay minus rollout buffer",
            SOURCE,
            "-",
            ours - without,
            ">=",
            0.05,
            n,
        ),
        claim(
            "no gradient",
            text + "no gradient and rollout buffer, distance of the means",
            SOURCE,
            "-",
            abs((idle - without).mean()),
            "<=",
            0.03,
            n,
        ),
        claim("taught", text + "relay minus no gradient", SOURCE, "-", ours - idle, ">", 0, n),
        claim(
            "buffer",
            text + "rollout buffer minus plain, worst seed",
            SOURCE,
            "-",
            (without - at["plain"]).min(),
            ">",
            0,
            n,
        ),
        claim("order", text + "plain, surest first minus own sampler", MDLM, "-", order, ">", 0, n),
        claim(
            "passes",
            f"passes to solve {GOAL:.0%}: relay / rollout buffer",
            SOURCE,
            "0.68",
            share,
            "<=",
            0.95,
            n,
        ),
    ]


def examples(models, test, eta):
    """Three boards as text -> them, and what each model makes of them."""
    boards, solutions = (x[:3] for x in test)
    prompts = [" ".join(map(str, board)).replace("0", ".") for board in boards.tolist()]
    answers = {}
    for arm, model in models.items():
        filled, when = solve(model, boards, ARMS[arm][1], eta)
        texts = [
            f"{' '.join(map(str, digits))}   ({passes} passes)"
            for digits, passes in zip(filled.tolist(), when.amax(1).tolist(), strict=True)
        ]
        answers[arm] = list(zip(texts, (filled == solutions).all(1).tolist(), strict=True))
    return prompts, answers


def main():
    config = parse_args(Config, __doc__)
    device = pick_device(config.device)
    with Run(config) as run:
        rng = random.Random("held out")  # the same boards for every seed
        test = [x.to(device) for x in boards(rng, config.test, config.givens, held_out=True)]
        for seed in seeds_of(config):
            pool = boards(random.Random(seed), config.boards, config.givens)
            models = {}
            for arm in ARMS:
                models[arm] = train(config, run, arm, seed, pool, device)
                evaluate(config, run, arm, seed, models[arm], test)
        prompts, answers = examples(models, test, config.eta)
        run.samples(prompts, **answers)
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
