"""weaver.py: many weak judges instead of one reward model, combined without a single label.

(Weaver, Saad-Falcon, Buchanan, Chen et al., arXiv 2506.18203.)

    python -m experiments.weaver            20 seeds in 3 seconds

The lesson (electives/bestofn.py) keeps the answer that one flawed score likes best. Here 12 judges
say yes or no to each of 32 answers; how often each is right nobody knows. If judges err
independently of one another, given whether an answer is right (Y), their agreement says how good
they are. Judge i says yes to a share t_i of right answers (TPR) and f_i of wrong ones (FPR):

    EM        guess Y by the mean vote; then in turn t, f and Pr[Y] from the guesses, and
              Pr[Y | votes] ~ Pr[Y] prod_i t_i^v_i (1 - t_i)^(1 - v_i) from those
    triplets  no guesses: cov_ij = (t_i - f_i) (t_j - f_j) var(Y), so that
              (t_i - f_i)^2 var(Y) = cov_ij cov_ik / cov_jk; the median over the pairs j, k

Each question keeps the answer of the largest Pr[Y | votes]. Rivals that need no label either: the
most frequent answer, the mean vote, the mean vote of judges that are neither nearly always yes nor
nearly always no. With labels: the best judge alone, and the true rates as weights.

What to see: of independent judges the weights nearly reach the true ones'. Where four judges share
their mistakes EM takes them for one another's witnesses, and overrates all four.

How this differs from the paper: simulated judges; no threshold for scores and no prior that is
taken from labels; Pr[Y] of the triplets comes from third moments; no distilled verifier.
"""

import itertools
from dataclasses import dataclass
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch

from electives.bestofn import majority
from experiment import Flags, Run, claim, command, flag, parse_args, seeds_of

SOURCE = "Saad-Falcon et al., arXiv 2506.18203"
SETTINGS = "independent judges", "4 of 12 share 70% of their noise"
ANSWERS = 32  # to a question
JUDGES = 12
CONSTANT = 3  # of them say yes to nearly everything
RULES = (
    "one answer",
    "best judge",
    "majority",
    "mean vote",
    "mean vote, filtered",
    "EM",
    "triplets",
    "true rates",
)


@dataclass
class Config(Flags):
    seeds: int = flag(20, "repeat over this many seeds", quick=1, low=1)
    questions: int = flag(200, "questions of 32 answers", quick=20, low=2, high=10**5)

    def idle(self):
        return {} if self.device in ("auto", "cpu") else {"device": "numpy works on the CPU"}


# --------------------------------------------------------------------------------------------------
# The label models: votes (n, judges) of 0 and 1 -> TPR, FPR (judges,) each, Pr[Y = 1]


def posterior(votes, tpr, fpr, prior):
    """The log-odds of Pr[Y = 1 | votes] (n,), by Bayes: judges are independent given Y."""
    yes = np.log(tpr / fpr)
    no = np.log((1 - tpr) / (1 - fpr))
    return votes @ yes + (1 - votes) @ no + np.log(prior / (1 - prior))


def em(votes, rounds=100):
    """Dawid & Skene 1979. It begins at the mean vote: judges are better than chance on the whole,
    or right and wrong would change places.
    """
    right = votes.mean(1)  # (n,): the guess of Y
    for _ in range(rounds):
        # one vote of each kind is added: no rate is ever 0 or 1
        tpr = (right @ votes + 1) / (right.sum() + 2)
        fpr = ((1 - right) @ votes + 1) / ((1 - right).sum() + 2)
        prior = right.mean().clip(1e-3, 1 - 1e-3)
        right = 1 / (1 + np.exp(-posterior(votes, tpr, fpr, prior)))
    return tpr, fpr, prior


def triplets(votes):
    """Moments (Fu et al., arXiv 2002.11955). A judge's gap is (t - f) sd(Y).

    The third moment of three judges is the product of their gaps times Y's skewness
    (1 - 2 prior) / sd(Y), which gives the prior.
    """
    centred = votes - votes.mean(0)
    cov = centred.T @ centred / len(votes)
    judges = range(votes.shape[1])
    gap = []
    for i in judges:
        pairs = itertools.combinations([j for j in judges if j != i], 2)
        squares = [cov[i, j] * cov[i, k] / cov[j, k] for j, k in pairs if cov[j, k] != 0]
        gap.append(np.sqrt(max(np.median(squares), 1e-6)))
    gap = np.array(gap)
    skews = []
    for i, j, k in itertools.combinations(judges, 3):
        moment = (centred[:, i] * centred[:, j] * centred[:, k]).mean()
        skews.append(moment / (gap[i] * gap[j] * gap[k]))
    skew = np.median(skews)
    prior = (0.5 - 0.5 * skew / np.sqrt(4 + skew**2)).clip(1e-3, 1 - 1e-3)
    difference = gap / np.sqrt(prior * (1 - prior))  # t - f
    fpr = votes.mean(0) - difference * prior
    tpr = fpr + difference
    return tpr.clip(0.01, 0.99), fpr.clip(0.01, 0.99), prior


# --------------------------------------------------------------------------------------------------
# Judges, and what each rule keeps


def simulate(rng, questions, shared):
    """right (Q, 32) bool, kinds (Q, 32) of final answers, votes (Q, 32, 12), and the true rates."""
    success = rng.beta(0.6, 1, questions)
    right = rng.random((questions, ANSWERS)) < success[:, None]  # (Q, 32)
    # 0 is the right answer; a question's wrong ones are five, some more tempting than others
    tempting = rng.dirichlet(np.full(5, 0.5), questions).cumsum(1)  # (Q, 5)
    wrong = (rng.random((questions, ANSWERS, 1)) > tempting[:, None, :-1]).sum(2) + 1
    kinds = np.where(right, 0, wrong)
    tpr = rng.uniform(0.5, 0.95, JUDGES)
    fpr = rng.uniform(0.1, 0.6, JUDGES)
    tpr[-CONSTANT:] = rng.uniform(0.95, 0.99, CONSTANT)
    fpr[-CONSTANT:] = tpr[-CONSTANT:] - 0.02
    noise = rng.random((questions, ANSWERS, JUDGES))
    common = rng.random((questions, ANSWERS, 1))  # what four judges see alike, most of the time
    alike = rng.random((questions, ANSWERS, JUDGES)) < 0.7
    alike[:, :, 4:] = False
    noise = np.where(alike & shared, common, noise)
    votes = noise < np.where(right[:, :, None], tpr, fpr)  # (Q, 32, 12)
    return right, kinds, votes.astype(float), tpr, fpr


def compare(questions, setting, seed):
    """A row: how often each rule keeps a right answer, and the rates that EM believes in."""
    rng = np.random.default_rng(seed)  # both settings: the same answers and judges
    right, kinds, votes, tpr, fpr = simulate(rng, questions, setting == SETTINGS[1])
    flat = votes.reshape(-1, JUDGES)  # (Q * 32, 12)
    mean = flat.mean(0)
    useful = (mean > 0.1) & (mean < 0.9)
    learnt = em(flat)
    scores = {
        "one answer": np.zeros(len(flat)),
        "mean vote": flat.mean(1),
        "mean vote, filtered": flat[:, useful].mean(1),
        "EM": posterior(flat, *learnt),
        "triplets": posterior(flat, *triplets(flat)),
        "true rates": posterior(flat, tpr, fpr, right.mean()),
    }
    ties = rng.random(len(flat)) * 1e-9

    def kept(score):
        """The share of questions whose answer of the largest score is right."""
        best = (score + ties).reshape(right.shape).argmax(1)
        return right[np.arange(questions), best].mean()

    row = {rule: kept(score) for rule, score in scores.items()}
    row["best judge"] = max(kept(flat[:, i]) for i in range(JUDGES))
    most = majority(torch.from_numpy(kinds)).numpy()
    row["majority"] = right[np.arange(questions), most].mean()
    return row | dict(tpr=tpr.tolist(), em_tpr=learnt[0].tolist())


# --------------------------------------------------------------------------------------------------
# The figure


def of(run, setting, key):
    """A number of each seed (seeds,), or a list of each (seeds, judges)."""
    return np.array([row[key] for row in run.rows if row["setting"] == setting])


def figure(config, run):
    n = config.seeds
    fig, (left, right) = plt.subplots(1, 2, figsize=(14, 5.5), layout="constrained")
    for i, setting in enumerate(SETTINGS):
        y = np.array([of(run, setting, rule) for rule in RULES])  # (rules, seeds)
        at = np.arange(len(RULES)) + 0.4 * i
        spread = y.std(1, ddof=1) if n > 1 else None
        left.barh(at, y.mean(1), 0.38, xerr=spread, label=setting, color=f"C{i}", ecolor="0.4")
        for x, mean in zip(at, y.mean(1), strict=True):
            left.text(0.01, x, f"{mean:.3f}", va="center", color="w", fontsize=8)
        true, believed = of(run, setting, "tpr"), of(run, setting, "em_tpr")
        right.scatter(true[:, :4], believed[:, :4], s=14, color=f"C{i}", label=f"{setting}: the 4")
        right.scatter(true[:, 4:], believed[:, 4:], s=6, color=f"C{i}", alpha=0.35, marker="x")
    left.set_yticks(np.arange(len(RULES)) + 0.2, RULES)
    left.invert_yaxis()
    left.set(xlabel="questions whose kept answer is right (fraction)", xlim=(0, 1))
    right.plot([0.4, 1], [0.4, 1], "k", lw=0.5)
    right.set(xlabel="true TPR of a judge", ylabel="TPR that EM believes in")
    right.set_title("Crosses: the other 8 judges")
    left.legend(loc="upper right")
    right.legend(loc="lower right")
    gains = {s: of(run, s, "EM") - of(run, s, "mean vote") for s in SETTINGS}
    left.set_title("Lines: one standard deviation over seeds")
    fig.suptitle(
        "EM without a label minus the mean vote: "
        + ", ".join(f"{gain.mean():+.3f} ({s})" for s, gain in gains.items())
        + f" ({n} seed{'s' * (n > 1)})"
    )
    return fig, judge(run, n)


def judge(run, n):
    """The claims, seed by seed."""

    def minus(setting, rule, rival):
        return of(run, setting, rule) - of(run, setting, rival)

    alone, together = SETTINGS

    def over(rival):
        return minus(alone, "EM", rival)

    mean = "independent: EM minus the mean vote"
    filtered = "independent: EM minus the filtered mean"
    most = "independent: EM minus majority"
    true = "independent: true rates minus EM"
    shared = "shared noise: triplets minus EM"
    return [
        claim(
            "mean",
            mean,
            SOURCE,
            "+0.171",
            over("mean vote"),
            ">=",
            0.02,
            n,
        ),
        claim("filtered", filtered, SOURCE, "-", over("mean vote, filtered"), ">", 0, n),
        claim("majority", most, SOURCE, "+0.135", over("majority"), ">", 0, n),
        claim(
            "true rates",
            true,
            "derived",
            "-",
            -over("true rates"),
            "<=",
            0.005,
            n,
        ),
        claim(
            "shared",
            shared,
            SOURCE,
            "-",
            minus(together, "triplets", "EM"),
            ">",
            0,
            n,
        ),
    ]


def main():
    config = parse_args(Config, __doc__)
    with Run(config) as run:
        run.introduce("cpu", 2 * JUDGES + 1)
        for seed in seeds_of(config):
            for setting in SETTINGS:
                row = partial(compare, config.questions, setting, seed)
                run.log_once(row, setting=setting, seed=seed, step=config.questions)
        run.save()
        run.finish(*figure(config, run))


if __name__ == "__main__":
    command(main)
