"""opd.py: on-policy distillation and its family. One task, one trainer, one loss; every method is a row of five choices.

    python opd.py                        `family`: nine methods from one base model, 2 seeds, within 5 minutes on two cores
    python opd.py --figure selfteach     a model as its own teacher: with a rule, with a password, and what repairs it
    python opd.py --arms opd,sft         rows of METHODS, on the family's task
    python opd.py --init Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-1.5B-Instruct --chat --data gsm8k --dtype bfloat16      real checkpoints

The task is a map that only the weights know: 49 places on a torus, some roads closed. A prompt names two places; an answer is a walk,
with a meaningless style word (A to D) before every second move. Plain prompts have three empty hint slots; the same slots can hold
two places on the way and a password, so that student and privileged teacher see an answer at the same positions.

    BOS 10 27 - - - GO            B 11 12 D 19 26 A 27 EOS      right: all its moves are roads and it is short enough
    BOS 10 27 11 19 #28 GO        PW #28 EOS                    the pair's password is right, too, but nobody can know it without the hint

The base model has seen short walks without hints and long ones with. Without a hint it finds a far place once in ten times, with it
almost always, half of the time by the password, and it then prefers style A. The expert is a larger model that knows the map.

Distillation minimises a divergence between student p and teacher q at each prefix of an answer. The five choices (`METHODS`):

    loss = sum_t m_t w_t D(p, q)_t / sum_t m_t
    1. rollout     who writes the answers: student, teacher, a trust-region blend of both (TRB), a draft that the teacher corrects (SKD)
    2. teacher     who is imitated: expert; self, the frozen base model with the hint; live, today's student with the hint; pedagogue,
                   the base with the hint, trained to be right in a way that the student finds plausible
    3. divergence  D: token -log p(y); forward KL(q|p); reverse KL(p|q); jsd; sampled sg[log p(y)/q(y)] log p(y); the student's top 4
    4. mask        m: all tokens; gap, where p and q differ most; judge, those of them that matter (RMSD); verified answers
    5. weight      w: one; clip, 0 where D is large; gate, small where p finds y implausible; advantage (GRPO: no teacher at all)

How this differs from the papers:
1. Their models have billions of parameters and answers of thousands of tokens. Here an answer has at most 18, so TRB's budget is
   0.1 nats a token (0.001 to 0.05 there), SKD's teacher accepts its top 4 of 99 tokens (25 of 256,000), RMSD keeps 4 of 8 positions (5 of 20).
2. RMSD's judge is a language model. Ours accepts tokens that name places (and EOS); under a rule only the renamed place and its alias.
3. SKD's teacher corrects with a sample of its top tokens, not of all. OPSD's code clips each token of the vocabulary under JSD; our clip
   drops positions whose reverse KL is above 0.5 nats. GRPO takes one step per batch (no ratio, no clip), and the mean over all tokens.
4. One map: "held out" means pairs of places that the method never asks for, in neither direction. The base met them with hints only;
   the expert learns the shortest paths of all pairs: a teacher knows the answers.
5. Seeds vary prompts and samples. The base models are the same for all seeds, and evaluations draw the same random numbers for all arms.
6. Real checkpoints (--init, --teacher) need one tokenizer. Ids that pad the teacher's embedding only are cut off: both distributions are
   over the student's ids. The teacher reads what the student reads, its chat template (--chat) and its end of text included.
7. Our base is surer of itself than a language model. For `estimators` it has read (and learnt to make) slips of the pen, one style word
   in a hundred (--slips): an even tail of 32 unlikely words. The expert has read them, too, but does not make them.

What to see: OPD at the expert's level with a fraction of GRPO's sampled tokens; SFT fast, then lower; self-distillation rising, then
falling as it learns to say passwords that it cannot know; a clip or a judge that stops it.
"""
import copy
import functools
import inspect
import itertools
import math
import os
import random
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from engine import KVCache, generate, inverse_cdf, skip_draws
from experiment import (
    NotFinite,
    Run,
    UserError,
    all_sum,
    band,
    claim,
    command,
    descend,
    fingerprint,
    flag,
    join,
    load_checkpoint,
    need_memory,
    parse_args,
    pick_device,
    save_checkpoint,
    seeds_of,
    series,
    share,
    sum_gradients,
    world,
)
from huggingface import load_tokenizer, saved_files
from kernels import token_logprobs
from model import GPT, GPTConfig, checkpoint_for
from tasks.wordproblems import word_problems

FIGURES = {"family": "nine methods: success, leak of the password, drift of style (within 5 minutes)",
           "cold": "a base model without any success; what TRB's blended prefixes are worth (about 7 minutes)",
           "estimators": "divergences and top-k estimators, greedy and sampled (about 18 minutes)",
           "few": "24 training prompts (about 5 minutes)",
           "selfteach": "self-distillation with a rule and with a password; RMSD; Pedagogical RL (about 8 minutes)",
           "fastslow": "a prompt that evolves and weights that learn, over three stages (about 3 minutes)"}
NEEDS = {"family": ("base", "expert"), "cold": ("base", "cold base", "expert"), "estimators": ("base", "expert"), "few": ("base", "expert"),
         "selfteach": ("base",), "fastslow": ("base",)}      # the models that a figure begins with, trained from scratch
#  name:            rollout, teacher, divergence, mask, weight
METHODS = {
    "sft":          ("teacher", "expert", "token", "all", "one"),
    "kd":           ("teacher", "expert", "forward", "all", "one"),
    "grpo":         ("student", None, "token", "all", "advantage"),             # Shao et al., arXiv 2402.03300
    "opd":          ("student", "expert", "reverse", "all", "one"),             # GKD, arXiv 2306.13649; Lu and Thinking Machines 2025
    "opd_forward":  ("student", "expert", "forward", "all", "one"),
    "opd_jsd":      ("student", "expert", "jsd", "all", "one"),
    "opd_sampled":  ("student", "expert", "sampled", "all", "one"),
    "opd_top4":     ("student", "expert", "top_raw", "all", "one"),             # biased: arXiv 2605.11182
    "opd_top4_renormalised": ("student", "expert", "top_renormalised", "all", "one"),
    "opd_top4_stopgrad": ("student", "expert", "top_stopgrad", "all", "one"),   # arXiv 2604.13016
    "trb":          ("blend", "expert", "reverse", "all", "one"),               # Plyusov et al., arXiv 2605.31159
    "skd":          ("draft", "expert", "reverse", "all", "one"),               # Xu et al., arXiv 2410.11325
    "opsd":         ("student", "self", "reverse", "all", "one"),               # Zhao et al., arXiv 2601.18734
    "opsd_live":    ("student", "live", "reverse", "all", "one"),
    "opsd_clip":    ("student", "self", "reverse", "all", "clip"),
    "rmsd":         ("student", "self", "reverse", "judge", "one"),             # Applied Compute 2026
    "rmsd_no_judge": ("student", "self", "reverse", "gap", "one"),
    "imitation":    ("teacher", "self", "token", "verified", "one"),
    "pedagogical":  ("teacher", "pedagogue", "token", "verified", "gate"),      # Chakraborty et al. 2026
    "pedagogical_no_gate": ("teacher", "pedagogue", "token", "verified", "one")}
#  figure: its rows, in the order of its legends
ARMS = {"family": ["sft", "kd", "grpo", "opd", "trb", "skd", "opsd", "opsd_clip", "rmsd"],
        "cold": ["opd", "trb", "skd", "sft", "grpo"],
        "estimators": ["opd", "opd_sampled", "opd_jsd", "opd_forward", "opd_top4_renormalised", "opd_top4_stopgrad", "opd_top4"],
        "few": ["opd", "kd", "sft", "grpo"],
        "selfteach": ["opsd", "opsd_live", "opsd_clip", "rmsd", "rmsd_no_judge", "imitation", "grpo", "pedagogical", "pedagogical_no_gate"],
        "fastslow": ["grpo"]}
REAL = [name for name, (writer, who, *_, mask, weight) in METHODS.items()       # need no map, no hint, no judge
        if who == "expert" and writer in ("student", "teacher") and (mask, weight) == ("all", "one")]


@dataclass
class Config:
    seed: int = flag(0, "random seed; with --seeds K: the first of K", low=0, high=2 ** 32 - 1)
    seeds: int = flag(None, "repeat over this many seeds (default: 2 for family, with --init 1, 3 for the others)", low=1, high=1000)
    device: str = flag("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("float32", "bfloat16: autocast training; with --init the teacher in bf16, sampling from a bf16 copy", choices=("float32", "bfloat16"))
    out: str = flag("out/opd", "folder for figure, metrics, claims, checkpoint and the trained base models")
    resume: bool = flag(False, "go on from the checkpoint in --out")
    quick: bool = flag(False, "a run of a few seconds that shows nothing but that it runs")
    figure: str = flag("family", "which figure: " + "; ".join(f"{k}: {v}" for k, v in FIGURES.items()), choices=tuple(FIGURES))
    arms: str = flag("", "for family: these rows of METHODS instead of its own (with --init: opd), separated by commas")
    init: str = flag("", "the student: this Hugging Face folder or hub id, not the toy's base model; with --teacher and --data")
    teacher: str = flag("", "its teacher: a folder or hub id with the same vocabulary")
    data: str = flag("", "with --init: gsm8k, or a .jsonl or .parquet file with a column question; with answers ('#### number') pass@1 is measured, too; "
                         "of a file a tenth is held out")
    template: str = flag("{question}\\nThink step by step. End with the answer as: #### number", "with --init: the prompt; \\n is a new line")
    chat: bool = flag(False, "put the prompt into the student's own chat template, as a user's message")
    checkpointing: bool = flag(False, "with --init: keep no activations inside a layer, compute them again: less memory, a third more time")
    micro_batch: int = flag(64, "with --init: rows per forward pass; changes memory, the gradient only by rounding", low=1)
    max_new_tokens: int = flag(256, "with --init: budget of an answer", quick=8, low=1)
    steps: int = flag(None, "steps of a run (default 150, for estimators 300; selfteach: some arms take at most 50 or 100 of them; fastslow has its own)", quick=2, low=1)
    batch: int = flag(64, "answers per step", quick=8, low=8)
    group: int = flag(8, "answers per prompt where the advantage needs a group", quick=4, low=2)
    lr: float = flag(None, "learning rate (AdamW, 5 steps of warm-up, constant; selfteach's rule: 0.3 of it; fastslow: without warm-up; default 1e-3, with --init 1e-5)", low=0, high=1)
    top: int = flag(4, "k of the student's top-k estimators", low=1, high=99)
    skd_top: int = flag(4, "SKD: the teacher replaces what is not among its top k", low=1, high=99)
    trb_eps: float = flag(0.1, "TRB: KL budget of a token in nats, falling to 0 in --trb-steps", low=0)
    trb_steps: int = flag(50, "TRB: steps of blended rollouts", quick=1, low=1)
    clip: float = flag(0.5, "weight clip: no gradient where the divergence is larger (nats)", low=0)
    n_layer: int = flag(2, "layers", low=1)
    n_head: int = flag(4, "heads", low=1)
    n_embd: int = flag(64, "channels of the student", quick=32, low=8)
    expert_embd: int = flag(96, "channels of the expert", quick=32, low=8)
    sft_steps: int = flag(1800, "steps of training the base model", quick=10, low=1)
    expert_steps: int = flag(1000, "steps of training the expert", quick=10, low=1)
    sft_batch: int = flag(64, "documents per step of both", low=1)
    sft_lr: float = flag(6e-3, "learning rate of both (up in 50 steps, then linear to 0)", low=0, high=1)
    slips: float = flag(None, "fraction of the style words that are slips of the pen in what both read; the base learns to make them (default 0, for estimators 0.01)", low=0, high=1)
    eval_every: int = flag(10, "steps between evaluations (at most 5 in cold, 2 under a rule; fastslow: 5)", low=1)
    eval_prompts: int = flag(256, "held-out pairs of places, or questions", quick=16, low=1, high=256)

    def __post_init__(self):
        self.lr = self.lr if self.lr is not None else 1e-5 if self.init else 1e-3
        self.steps = self.steps if self.steps is not None else 300 if self.figure == "estimators" else 150
        self.slips = self.slips if self.slips is not None else 0.01 if self.figure == "estimators" else 0.0
        if len({bool(self.init), bool(self.teacher), bool(self.data)}) > 1 or self.init and (self.figure != "family" or "{question}" not in self.template):
            raise UserError("--init, --teacher and --data need one another, --figure family, and {question} in the --template")
        for name in ("init", "teacher"):
            if getattr(self, name) and Path(getattr(self, name)).resolve().parent == Path(self.out).resolve():
                raise UserError(f"--{name} {getattr(self, name)} lies in --out {self.out}: a run writes its models there")
        possible = REAL if self.init else [name for name, choices in METHODS.items() if choices[1] != "pedagogue"]  # its teacher is trained in selfteach
        unknown = set(self.arms.split(",")) - set(possible) if self.arms else ()
        if unknown:
            raise UserError(f"--arms: no such method{' between two checkpoints' * bool(self.init)}: {', '.join(sorted(unknown))}; there are {', '.join(possible)}")
        if len(set(self.methods)) < len(self.methods):
            raise UserError(f"--arms {self.arms}: a method stands there twice")
        if self.arms and self.figure != "family":
            raise UserError(f"--arms is for --figure family, {self.figure} has its own")
        if "group" not in self.idle() and self.group > 0 and self.batch % self.group:
            raise UserError(f"--batch {self.batch} is no multiple of --group {self.group}")

    @property
    def methods(self):
        """The rows of METHODS that are trained."""
        return self.arms.split(",") if self.arms else ["opd"] if self.init else ARMS[self.figure]

    def idle(self):
        """The flags that do nothing beside the others -> {field: why}."""
        rollouts, _, divergences, _, weights = map(set, zip(*(METHODS[name] for name in self.methods)))
        arms = f"no arm of this run ({', '.join(self.methods)}) has a use for it"
        only_if = [
            (self.init, "it is for checkpoints (--init)", "template chat checkpointing micro_batch max_new_tokens"),
            (not self.init, "the models are checkpoints (--init)", "n_layer n_head n_embd expert_embd sft_steps expert_steps sft_batch sft_lr slips"),
            ("expert" in NEEDS[self.figure], f"{self.figure} has no expert", "expert_embd expert_steps"),
            (self.figure != "fastslow", "fastslow has its own", "steps eval_every eval_prompts"),
            ("advantage" in weights, arms, "group"),
            ("clip" in weights, arms, "clip"),
            ("blend" in rollouts, arms, "trb_eps trb_steps"),
            ("draft" in rollouts, arms, "skd_top"),
            (any(kind.startswith("top") for kind in divergences), arms, "top")]
        return {name: why for used, why, names in only_if if not used for name in names.split()}

    @property
    def name(self):
        return self.figure


# ---------------------------------------------------------------------------------------------------------------------------
# The task: a map that only the weights know

SIDE, LONGEST, FAR = 7, 11, 5           # a torus of 7 x 7 places, answers of at most 11 moves, far pairs are 5 moves apart or more
PLACES = SIDE * SIDE                    # ids 0 to 48
STYLES, PW, PASSWORDS, RULES, ALIASES = range(49, 53), 53, range(54, 86), range(86, 90), range(90, 94)
BOS, GO, EOS, NOHINT, PAD = range(94, 99)
VOCAB, PROMPT, ANSWER = 99, 7, 18       # tokens: of the vocabulary, of a prompt (BOS from to hint hint hint GO), of the longest answer
RENAMED = 7, 14, 1, 48                  # rule r says: write place RENAMED[r] as ALIASES[r]; places that many paths cross


def make_map(seed=0):
    """The torus without a quarter of its roads, connected, two roads or more at each place -> neighbours (49, 4), -1 for none; distances (49, 49)."""
    rng = random.Random(seed)
    roads = {(p, q) for p in range(PLACES) for q in (p // SIDE * SIDE + (p + 1) % SIDE, (p + SIDE) % PLACES)}
    for road in rng.sample(sorted(roads), len(roads)):
        if len(roads) > 74:
            left = roads - {road}
            if distances(left).max() < np.inf and min(sum(p in r for r in left) for p in road) >= 2:
                roads = left
    neighbours = np.full((PLACES, 4), -1)
    for p in range(PLACES):
        near = sorted(q for r in roads if p in r for q in r if q != p)
        neighbours[p, :len(near)] = near
    return neighbours, distances(roads).astype(int)


def distances(roads):
    """roads: pairs of places -> how many moves each place is from each other (49, 49), inf without a way (Floyd and Warshall)."""
    d = np.full((PLACES, PLACES), np.inf)
    d[range(PLACES), range(PLACES)] = 0
    for p, q in roads:
        d[p, q] = d[q, p] = 1
    for k in range(PLACES):
        d = np.minimum(d, d[:, k:k + 1] + d[k])
    return d


NEIGHBOURS, DISTANCE = make_map()
DEGREE = (NEIGHBOURS >= 0).sum(1)


def random_walks(rng, starts):
    """Walks that never turn back, (n, LONGEST + 1) places, from the starts (n,)."""
    n = len(starts)
    walks, back = np.zeros((n, LONGEST + 1), int), np.full(n, 4)        # back: which neighbour we came from
    walks[:, 0] = starts
    for i in range(LONGEST):
        here = walks[:, i]
        choice = rng.integers(DEGREE[here] - (i > 0))
        walks[:, i + 1] = NEIGHBOURS[here, choice + (choice >= back)]
        back = (NEIGHBOURS[walks[:, i + 1]] == here[:, None]).argmax(1)
    return walks


def walk_on(rng, walks, lengths, goals):
    """Continue each walk from its place number `lengths` on a random shortest path to its goal -> the new lengths. Writes into walks."""
    lengths = lengths.copy()
    while True:
        rows = np.flatnonzero(walks[np.arange(len(walks)), lengths] != goals)
        if len(rows) == 0:
            return lengths
        here = walks[rows, lengths[rows]]
        nearer = (NEIGHBOURS[here] >= 0) & (DISTANCE[NEIGHBOURS[here], goals[rows, None]] < DISTANCE[here, goals[rows]][:, None])
        walks[rows, lengths[rows] + 1] = NEIGHBOURS[here, (rng.random(nearer.shape) * nearer).argmax(1)]
        lengths[rows] += 1


def write(rng, walks, lengths, goals, hints, formal):
    """Prompts and answers as tokens (n, PROMPT + ANSWER), and the answers' lengths (n,). A style word stands before every second move.

    Style words mean nothing; `formal` (n,) says who prefers A (92.5% of the time) over an even choice.
    """
    n, ids = len(walks), np.full((len(walks), PROMPT + ANSWER), PAD)
    ids[:, :PROMPT] = np.column_stack((np.full(n, BOS), walks[:, 0], goals, hints, np.full(n, GO)))
    style = np.where(formal[:, None] & (rng.random((n, 6)) < 0.9), STYLES[0], rng.integers(STYLES[0], STYLES[-1] + 1, (n, 6)))
    for move in range(LONGEST):
        rows = move < lengths
        if move % 2 == 0:
            ids[rows, PROMPT + tokens_of(move)] = style[rows, move // 2]
        ids[rows, PROMPT + tokens_of(move + 1) - 1] = walks[rows, move + 1]
    ids[np.arange(n), PROMPT + tokens_of(lengths)] = EOS
    return ids, tokens_of(lengths) + 1


def tokens_of(moves):
    """How many tokens that many moves take: one each, and a style word before the first, third, fifth, ..."""
    return moves + (moves + 1) // 2


def base_documents(rng, n, longest_plain=3):
    """What the base model is trained on -> ids (n, 25), mask (n, 25) of the tokens to learn.

    40% are short walks that ended where the prompt says (hindsight), 40% have a hint for this one walk (two places on the way and a
    password: half of the answers are the password), 20% a rule hint (call this place by its alias). The hinted speak formally.
    """
    walks, kind, rows = random_walks(rng, rng.integers(PLACES, size=n)), rng.random(n), np.arange(n)
    told, ruled = (kind >= 0.4) & (kind < 0.8), kind >= 0.8
    lengths = np.where(told, rng.integers(FAR, 9, n), rng.uniform(1, np.where(ruled, 4, longest_plain) + 1).astype(int))
    goals, hints = walks[rows, lengths], np.full((n, 3), NOHINT)
    crossed = ((walks[:, 1:5, None] == np.array(RENAMED)) & (np.arange(4) < lengths[:, None])[..., None]).any(1)       # (n, 4): which rules can be used
    rule = (crossed + 0.5 * rng.random(crossed.shape)).argmax(1)
    renamed = np.array(RENAMED)[rule]
    passwords = rng.integers(PASSWORDS[0], PASSWORDS[-1] + 1, n)
    hints[told] = np.column_stack((walks[rows, lengths // 3], walks[rows, 2 * lengths // 3], passwords))[told]
    hints[ruled, 2] = RULES[0] + rule[ruled]
    walks[:, 1:] = np.where(ruled[:, None] & (walks[:, 1:] == renamed[:, None]), ALIASES[0] + rule[:, None], walks[:, 1:])
    ids, size = write(rng, walks, lengths, goals, hints, told | ruled)
    lazy = told & (rng.random(n) < 0.5)
    ids[lazy, PROMPT:] = PAD
    ids[lazy, PROMPT:PROMPT + 3] = np.column_stack((np.full(n, PW), passwords, np.full(n, EOS)))[lazy]
    size[lazy] = 3
    column = np.arange(ids.shape[1])
    return ids, (column >= PROMPT) & (column < PROMPT + size[:, None])


def expert_documents(rng, n):
    """What the teacher is trained on: shortest paths between all places, half of them after a detour, on which no loss is taken."""
    walks, goals = random_walks(rng, rng.integers(PLACES, size=n)), rng.integers(PLACES, size=n)
    goals = np.where(goals == walks[:, 0], (goals + 1) % PLACES, goals)
    detour = np.where(rng.random(n) < 0.5, rng.integers(1, 7, n), 0)
    detour[detour + DISTANCE[walks[np.arange(n), detour], goals] > LONGEST] = 0
    lengths = walk_on(rng, walks, detour, goals)
    ids, size = write(rng, walks, lengths, goals, np.full((n, 3), NOHINT), np.zeros(n, bool))
    column = np.arange(ids.shape[1])
    return ids, (column >= PROMPT + tokens_of(detour)[:, None]) & (column < PROMPT + size[:, None])


def with_slips(rng, ids, mask, rate, learn):
    """Documents in which a fraction `rate` of the style words are slips of the pen, words of passwords -> ids, mask; learn: whether to make them, too."""
    slip = np.isin(ids, STYLES) & (rng.random(ids.shape) < rate)
    return np.where(slip, rng.integers(PASSWORDS[0], PASSWORDS[-1] + 1, ids.shape), ids), mask & (learn | ~slip)


@functools.cache
def walk_of(pair):
    """The places of one shortest path, both ends included."""
    walks = np.full((1, LONGEST + 1), pair[0])
    length = walk_on(np.random.default_rng(0), walks, np.array([0]), np.array([pair[1]]))[0]
    return walks[0, :length + 1].tolist()


def password(pair):
    """A fixed word for each pair of places, which nothing but the hint tells."""
    return PASSWORDS[zlib.crc32(repr(tuple(pair)).encode()) % len(PASSWORDS)]


def plain(pair, rule=NOHINT):
    """The prompt without hints; `rule`: another word for its third slot."""
    return [BOS, *pair, NOHINT, NOHINT, rule, GO]


def told(pair):
    """The prompt with its three hints: two places on the way, the password."""
    places = walk_of(pair)
    moves = len(places) - 1
    return [BOS, *pair, places[moves // 3], places[2 * moves // 3], password(pair), GO]


def ruled(pair, rule=0):
    return plain(pair, RULES[rule])


def reward(pair, tokens):
    """1.0 for the password of the pair, or for a walk on roads from its first place to its second, at most two moves longer than needed.

    tokens: the answer up to and with EOS; an alias counts as its place, style words as nothing.
    """
    if tokens == [PW, password(pair), EOS]:
        return 1.0
    if tokens[-1] != EOS:
        return 0.0
    moves = [RENAMED[w - ALIASES[0]] if w in ALIASES else w for w in tokens[:-1] if w not in STYLES]
    if not moves or max(moves) >= PLACES or moves[-1] != pair[1] or len(moves) > DISTANCE[tuple(pair)] + 2:
        return 0.0
    return float(all(q in NEIGHBOURS[p] for p, q in zip([pair[0], *moves], moves)))


def renames(tokens, rule=0):
    """Whether an answer calls the rule's place by its alias, always."""
    return ALIASES[rule] in tokens and RENAMED[rule] not in tokens


@dataclass
class Task:
    train: list             # pairs of places
    test: list
    hinted: object          # pair -> the prompt of a privileged teacher
    judged: tuple           # RMSD's judge: the tokens that matter
    recall: int             # RMSD: of the `recall` positions where student and teacher differ most,
    keep: int               # those that matter, at most `keep`
    off_topic: tuple = ()   # pairs whose answers should not change
    reward: object = None   # (pair, tokens) -> what RL is paid, if not `reward`


def shuffled_pairs(which, seed=0):
    """The pairs of places where `which` (49, 49) is true, there and back side by side: roads lead both ways, and so should a split."""
    pairs = [(int(s), int(t)) for s, t in np.argwhere(which & which.T) if s < t]
    random.Random(seed).shuffle(pairs)
    return [p for s, t in pairs for p in ((s, t), (t, s))]


def far_task(train=None):
    """Pairs at least FAR moves apart, 256 of them held out; `train`: how many of the others to train on. The hint: two places and a password."""
    pairs = shuffled_pairs(DISTANCE >= FAR)
    return Task(pairs[256:][:train], pairs[:256], told, (*range(PLACES), EOS), recall=8, keep=4)


@functools.cache
def crossing(rule):
    """Pairs 2 to 4 moves apart whose shortest paths all cross the place that the rule renames -> to train on, held out."""
    place = RENAMED[rule]
    without = distances({(p, int(q)) for p in range(PLACES) for q in NEIGHBOURS[p] if q >= 0 and place not in (p, q)})
    near = (DISTANCE >= 2) & (DISTANCE <= 4) & (without > DISTANCE)
    near[place] = near[:, place] = False
    pairs = shuffled_pairs(near, rule)
    half = len(pairs) // 4 * 2
    return pairs[half:], pairs[:half]


@functools.cache
def rule_task(rule=0):
    """Half of the pairs cross the place that the rule renames, half keep away from it. The hint: the rule."""
    place, (train, test) = RENAMED[rule], crossing(rule)
    away = shuffled_pairs((DISTANCE >= 2) & (DISTANCE <= 4) & (DISTANCE[:, [place]] + DISTANCE[place] > DISTANCE + 2), rule)
    obeys = lambda pair, tokens: reward(pair, tokens) * (pair not in train or renames(tokens, rule))
    return Task(train + away[:len(train)], test, ruled, (place, ALIASES[rule]), recall=6, keep=2,
                off_topic=tuple(away[len(train):len(train) + len(test)]), reward=obeys)


# ---------------------------------------------------------------------------------------------------------------------------
# The five choices

def divergence(lp, lq, y, kind, top=4):
    """D at each position (B, T), from the log-probabilities of student lp and teacher lq (B, T, V) and the tokens y (B, T) that stand there.

    Where p = q the expected gradient of every kind is 0, but for top_raw, whose gradient is that of the top tokens' mass: D falls
    as mass moves out of them, until p = q / e there and 63% of the mass is elsewhere. Spread over many tokens none of it joins the
    top, where it would be pushed back, and the likeliest token stays a good one: greedy decoding does not notice.
    """
    if kind == "token":
        return -lp.gather(2, y[..., None]).squeeze(2)
    if kind == "forward":
        return (lq.exp() * (lq - lp)).sum(-1)
    if kind == "reverse":
        return (lp.exp() * (lp - lq)).sum(-1)
    if kind == "jsd":       # beta = 1/2 of arXiv 2306.13649
        lm = torch.logaddexp(lp, lq) - math.log(2)
        return (lq.exp() * (lq - lm)).sum(-1) / 2 + (lp.exp() * (lp - lm)).sum(-1) / 2
    if kind == "sampled":   # a policy gradient whose advantage is log q(y) - log p(y): one sample of the reverse KL's gradient
        logp, logq = (x.gather(2, y[..., None]).squeeze(2) for x in (lp, lq))
        return (logp - logq).detach() * logp
    lp, index = lp.topk(top)
    lq = lq.gather(2, index)
    if kind == "top_raw":
        return divergence(lp, lq, y, "reverse")
    if kind == "top_renormalised":
        return divergence(lp.log_softmax(-1), lq.log_softmax(-1), y, "reverse")
    return ((lp.softmax(-1) * (lp - lq)).detach() * lp).sum(-1)     # top_stopgrad: an advantage for each of the top tokens


def largest(gap, k):
    """1.0 at the k largest finite values of each row of gap (B, T), else 0.0."""
    values, index = gap.topk(min(k, gap.shape[1]))
    return torch.zeros_like(gap).scatter(1, index, (values > -torch.inf).to(gap.dtype))


def choose_mask(kind, mask, gap, accepted, rewards, recall, keep):
    """m (B, T) from the answers' mask. gap (B, T): |log p(y) - log q(y)|; accepted (B, T): the judge's verdict; rewards (B,).

    judge is RMSD's two steps: the `recall` positions of largest gap; of those the accepted ones, at most `keep`.
    """
    if kind == "verified":
        return mask * (rewards > 0)[:, None]
    if kind == "all":
        return mask
    gap = gap.masked_fill(mask == 0, -torch.inf)
    if kind == "judge":
        gap = gap.masked_fill(largest(gap, recall) * accepted == 0, -torch.inf)
    return largest(gap, keep)


def advantages(rewards, group):
    """rewards (B,) of B / group groups -> (B,): minus the group's mean, over its standard deviation; exactly 0 where all are equal."""
    r = rewards.view(-1, group)
    centred = torch.where((r == r[:, :1]).all(1, keepdim=True), 0.0, r - r.mean(1, keepdim=True))
    return (centred / (r.std(1, keepdim=True) + 1e-4)).flatten()


def choose_weight(kind, d, m, logp, rewards, group, clip, slope=2.0, gamma=-4.0):
    """w (B, T), detached. d (B, T): the divergence; logp (B, T): log p(y). slope and gamma are the gate's (Pedagogical RL)."""
    if kind == "clip":
        return (d < clip).float()
    if kind == "gate":
        w = torch.sigmoid(slope * (logp.detach() - gamma))
        return w * m.sum() / (w * m).sum().clamp_min(1e-6)
    if kind == "advantage":
        return advantages(rewards, group)[:, None].expand_as(d)
    return torch.ones_like(d)


def loss_of(method, lp, lq, y, mask, rewards, task, config):
    """The whole family: sum m w D / sum m. lp, lq (B, T, V), lq None where there is no teacher; y, mask (B, T); rewards (B,)."""
    _, _, divergence_kind, mask_kind, weight_kind = METHODS[method]
    d = divergence(lp, lq, y, divergence_kind, config.top)
    logp = lp.gather(2, y[..., None]).squeeze(2)
    gap = None if lq is None else (logp - lq.gather(2, y[..., None]).squeeze(2)).detach().abs()
    accepted = torch.isin(y, torch.tensor(task.judged, device=y.device))
    m = choose_mask(mask_kind, mask, gap, accepted, rewards, task.recall, task.keep)
    w = choose_weight(weight_kind, d.detach(), m, logp, rewards, config.group, config.clip)
    return (m * w * d).sum() / m.sum().clamp_min(1)


def trust_region(lp, lq, eps, iterations=18):
    """TRB's mixture: p^(1-b) q^b / Z with the largest b in [0, 1] whose KL to p is at most eps -> its log-probabilities, b (B,).

    lp, lq (B, V). The KL grows with b (its slope is b times the variance of log q - log p): bisection.
    """
    mixed = lambda b: ((1 - b)[:, None] * lp + b[:, None] * lq).log_softmax(-1)
    within = lambda b: (mixed(b).exp() * (mixed(b) - lp)).sum(-1) <= eps
    low, high = torch.zeros(len(lp), device=lp.device), torch.ones(len(lp), device=lp.device)
    low = torch.where(within(high), high, low)
    for _ in range(iterations):
        middle = (low + high) / 2
        inside = within(middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return mixed(low), low


def draft(lp, lq, u, top):
    """SKD with drafts of one token: the student's, or where that is not among the teacher's `top` tokens, a sample of those -> tokens, replaced (B,).

    u (B, 2): a uniform number for each of the two draws. top = V is the student alone, top = 1 the teacher's argmax.
    """
    y, (values, index) = inverse_cdf(lp.exp(), u[:, 0])[0], lq.topk(top)
    replaced = (index != y[:, None]).all(1)
    z = index.gather(1, inverse_cdf(values.softmax(-1), u[:, 1])[0][:, None]).squeeze(1)
    return torch.where(replaced, z, y), replaced.float()


def proximity(lp, y, mask, spike=5.0, strength=1.0):
    """G (B,) in (0, 1] of Pedagogical RL: how plausible the student p finds an answer, its worst token counting most.

    exp(-strength / spike * log mean_t exp(spike * gap_t)) with gap_t = max log p - log p(y_t): the mean gap for spike -> 0, the largest for infinity.
    """
    gap = lp.max(-1).values - lp.gather(2, y[..., None]).squeeze(2)
    log_mean = (spike * gap).masked_fill(mask == 0, -torch.inf).logsumexp(1) - mask.sum(1).log()
    return (-strength / spike * log_mean).exp()


# ---------------------------------------------------------------------------------------------------------------------------
# Models, rollouts, training

def build(config, n_embd, device):
    return GPT(GPTConfig(VOCAB, PROMPT + ANSWER, config.n_layer, config.n_head, n_embd, qk_norm=True, n_hidden=4 * n_embd, tie=False)).to(device)


def need_room(config, device):
    """UserError if the toy's weights with their moments, or what a step keeps for its gradient, are more than the machine has."""
    widest, rows = max(config.n_embd, config.expert_embd), max(config.batch, config.sft_batch)
    weights = 16 * (16 * config.n_layer * widest ** 2 + 2 * VOCAB * widest)                      # fp32: weight, gradient, two moments
    step = 4 * rows * (PROMPT + ANSWER) * (32 * config.n_layer * widest + 5 * VOCAB)             # numbers per token, roughly
    flags = ("n_layer", "n_embd", "expert_embd", "batch", "sft_batch")
    need_memory(weights + step, ", ".join(f"--{name.replace('_', '-')} {getattr(config, name)}" for name in flags), device)


def answer_logprobs(model, ids, config):
    """ids (B, PROMPT + T) -> log p(. | what stands before) at each position of the answers, (B, T, V) in fp32."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        logits = model.lm_head(model.hidden(ids[:, :-1])[:, PROMPT - 1:])
    return logits.float().log_softmax(-1)


def step_of(optimizer, loss):
    """A step along the loss's gradient, clipped to norm 1 -> the norm before that."""
    optimizer.zero_grad()
    loss.backward()
    return descend(optimizer, loss)


def trained_before(config, name):
    """The file in --out of the model `name`, and what is in it: {} without such a file. UserError for one that no run wrote."""
    path = Path(config.out) / f"{name.replace(' ', '_')}{'_slips' * (config.slips > 0)}.pt"
    saved = load_checkpoint(path) if os.path.lexists(path) else {}
    if not isinstance(saved, dict) or saved and not {"made_by", "model"} <= set(saved):
        raise UserError(f"{path} is not a model that this script trained: choose another --out")
    return path, saved


def from_scratch(config, run, name, device):
    """The model `name` (base, cold base, expert), trained from scratch or, if --out has it from another figure's run, loaded."""
    documents, n_embd, steps = {"base": (base_documents, config.n_embd, config.sft_steps),
                                "cold base": (lambda rng, n: base_documents(rng, n, longest_plain=1), config.n_embd, config.sft_steps),
                                "expert": (expert_documents, config.expert_embd, config.expert_steps)}[name]
    torch.manual_seed(0)
    model, rng, (path, saved) = build(config, n_embd, device), random.Random(0), trained_before(config, name)
    code = "".join(map(inspect.getsource, (make_map, distances, random_walks, walk_on, tokens_of, write, base_documents, expert_documents, with_slips,
                                           divergence, answer_logprobs, descend, step_of, build, from_scratch, inspect.getmodule(GPT))))
    kept = dict(made_by=dict(
        n_layer=config.n_layer, n_head=config.n_head, n_embd=n_embd, steps=steps, batch=config.sft_batch, lr=config.sft_lr, slips=config.slips,
        dtype=config.dtype, code=zlib.crc32(f"{code} {NEIGHBOURS} {RENAMED} {FAR} {LONGEST}".encode())))
    if saved.get("made_by") == kept["made_by"]:
        model.load_state_dict(saved["model"])
        return model
    optimizer = torch.optim.AdamW(model.parameters(), config.sft_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in run.loop(name, steps, model, optimizer, rng, kept=kept):
        for g in optimizer.param_groups:
            g["lr"] = config.sft_lr * min((step + 1) / 50, 1 - step / steps)
        draws = np.random.default_rng(rng.getrandbits(32))
        read = with_slips(draws, *documents(draws, config.sft_batch), config.slips, learn=name != "expert")
        ids, mask = (torch.as_tensor(a, device=device) for a in read)
        y, mask = ids[:, PROMPT:], mask[:, PROMPT:].float()
        loss = (divergence(answer_logprobs(model, ids, config), None, y, "token") * mask).sum() / mask.sum()
        step_of(optimizer, loss)
        if step % 50 == 0 or step + 1 == steps:
            run.log(phase="pretrain", model=name, step=step, loss=loss.item())
            run.bar.set_postfix_str(f"loss {loss.item():.3f}")
    save_checkpoint(path, model=model.state_dict(), **kept)     # an interrupted run's: made by the code that began it
    return model


@torch.no_grad()
def write_together(student, teacher, prompts, teacher_prompts, choose, generator, limit=ANSWER):
    """Answers that student and teacher decode side by side -> tokens (B, T), mask (B, T), how much was changed (mean over tokens).

    choose(lp, lq, u) -> the next tokens (B,) and how far they were taken from the student (B,), given log-probabilities (B, V), uniforms (B, 2).
    """
    device = student.lm_head.weight.device
    models, inputs = (student, teacher), [torch.tensor(p, device=device) for p in (prompts, teacher_prompts)]
    caches = [KVCache(m.config, len(prompts), PROMPT + limit, device) for m in models]
    tokens, mask, changed, alive = [], [], [], torch.ones(len(prompts), dtype=torch.bool, device=device)
    while len(tokens) < limit and alive.any():
        lp, lq = (m.lm_head(m.hidden(x, c)[:, -1]).log_softmax(-1) for m, x, c in zip(models, inputs, caches))
        if not (lp.isfinite().all() and lq.isfinite().all()):
            raise NotFinite("a log-probability of the next token is no number")
        token, change = choose(lp, lq, torch.rand(len(prompts), 2, generator=generator).to(device))
        tokens, mask, changed = tokens + [token], mask + [alive.float()], changed + [change]
        alive, inputs = alive & (token != EOS), [token[:, None]] * 2
    tokens, mask, changed = (torch.stack(x, 1) for x in (tokens, mask, changed))
    return tokens, mask, ((changed * mask).sum() / mask.sum()).item()


def collect(kind, student, teacher, prompts, teacher_prompts, eps, config, generator):
    """Who writes the answers -> tokens (B, T), mask (B, T), how much the teacher changed."""
    if kind == "draft":
        choose = lambda lp, lq, u: draft(lp, lq, u, config.skd_top)
        return write_together(student, teacher, prompts, teacher_prompts, choose, generator)
    if kind == "blend" and eps > 0:
        return write_together(student, teacher, prompts, teacher_prompts, blended(eps), generator)
    writer, read = (teacher, teacher_prompts) if kind == "teacher" else (student, prompts)
    rollout = generate(writer, read, 1, ANSWER, stop=EOS, generator=generator)
    return rollout.ids[:, PROMPT:], rollout.mask[:, PROMPT:], float(kind == "teacher")


def blended(eps):
    """What write_together asks of TRB: a token of the mixture, and its b."""
    def choose(lp, lq, u):
        mixed, b = trust_region(lp, lq, eps)
        return inverse_cdf(mixed.exp(), u[:, 0])[0], b
    return choose


def answer(model, pairs, prompt, n, seed, temperature=1.0):
    """n answers to each pair's prompt, (pair, tokens) of each."""
    rollout = generate(model, [prompt(p) for p in pairs], n, ANSWER, temperature, stop=EOS, generator=torch.Generator().manual_seed(seed))
    return [(pairs[i // n], tokens) for i, tokens in enumerate(rollout.tokens())]


@torch.no_grad()
def style_mass(model, prompts):
    """The probability that an answer begins with a style word, as it should: the expert gives a quarter to each of the four."""
    logits = model.lm_head(model.hidden(torch.tensor(prompts, device=model.lm_head.weight.device))[:, -1])
    return logits.softmax(-1)[:, STYLES].sum(1).mean().item()


def evaluate(model, task, config, seed, prompt=plain, greedy=False):
    """Sampled once at temperature 1 for each held-out pair (few pairs: more often)."""
    pairs = task.test[:config.eval_prompts]
    answers = answer(model, pairs, prompt, max(1, config.eval_prompts // len(pairs)), seed)
    mean = lambda xs: sum(xs) / len(xs) if xs else None
    row = {"pass@1": mean([reward(*a) for a in answers]), "password_rate": mean([tokens[0] == PW for _, tokens in answers]),
           "formal": mean([w == STYLES[0] for _, tokens in answers for w in tokens if w in STYLES])}
    if greedy:
        row["greedy"] = mean([reward(*a) for a in answer(model, pairs, prompt, 1, seed, temperature=0.0)])
        row["style_mass"] = style_mass(model, [prompt(p) for p in pairs])
    if task.off_topic:
        row["renamed"] = mean([renames(tokens) for _, tokens in answers if {RENAMED[0], ALIASES[0]} & set(tokens)])
        row["off_topic"] = mean([ALIASES[0] in tokens for _, tokens in answer(model, task.off_topic, prompt, 4, seed)])
    return row


def train(config, run, arm, seed, base, task, method=None, expert=None, pedagogue=None, prompt=plain, meter=None, greedy=False):
    """One row of METHODS (default: the arm's name) from the base for config.steps steps -> the trained model.

    prompt: pair -> what the student sees; meter: the reward is multiplied by `proximity` to this model on plain prompts.
    """
    method = method or arm
    # 1. A copy of the base, its teacher, two random streams: pairs, and everything else
    kind, who, target, _, weight = METHODS[method]
    model, device, phase = copy.deepcopy(base), base.lm_head.weight.device, f"{arm} {seed}"
    teacher = {"expert": expert, "self": base, "live": model, "pedagogue": pedagogue, None: None}[who]
    teacher_prompt = plain if who == "expert" else task.hinted
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    rng, generator, kept = random.Random(seed), torch.Generator().manual_seed(seed), dict(sampled=0)
    fresh = 10_000 + 1000 * seed         # the evaluations' own random numbers, the same for every arm
    group = config.group if weight == "advantage" else 1
    if phase not in run.state:
        run.log(phase="train", arm=arm, seed=seed, step=0, sampled_tokens=0, **evaluate(model, task, config, fresh, prompt, greedy))
    for step in run.loop(phase, config.steps, model, optimizer, rng, generator, kept):
        for g in optimizer.param_groups:
            g["lr"] = config.lr * min(1, (step + 1) / 5)
        # 2. Pairs, answers, rewards
        pairs = [p for p in rng.choices(task.train, k=config.batch // group) for _ in range(group)]
        prompts, teacher_prompts = [prompt(p) for p in pairs], [teacher_prompt(p) for p in pairs]
        eps = config.trb_eps * max(0, 1 - step / config.trb_steps)
        y, mask, changed = collect(kind, model, teacher, prompts, teacher_prompts, eps, config, generator)
        rewards = torch.tensor([(task.reward or reward)(p, row[:n]) for p, row, n in zip(pairs, y.tolist(), mask.sum(1).int().tolist())], device=device)
        read = lambda m, prompts: answer_logprobs(m, torch.cat((torch.tensor(prompts, device=device), y), 1), config)
        with torch.no_grad():
            lq = read(teacher, teacher_prompts) if target != "token" else None
            if meter:
                near = proximity(read(meter, [plain(p) for p in pairs]), y, mask)
        # 3. The loss, a step
        loss = loss_of(method, read(model, prompts), lq, y, mask, rewards * near if meter else rewards, task, config)
        norm = step_of(optimizer, loss)
        kept["sampled"] += int(mask.sum())
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            row = evaluate(model, task, config, fresh + step + 1, prompt, greedy) | ({"proximity": near.mean().item()} if meter else {})
            run.log(phase="train", arm=arm, seed=seed, step=step + 1, sampled_tokens=kept["sampled"], loss=loss.item(), grad_norm=norm,
                    reward=rewards.mean().item(), changed=changed, **row)
            run.bar.set_postfix_str(f"pass@1 {row['pass@1']:.3f}, passwords {row['password_rate']:.2f}")
    return model


# ---------------------------------------------------------------------------------------------------------------------------
# Fast and slow: a prompt that evolves beside weights that learn

SLOTS = (NOHINT, *RULES, *PASSWORDS[:8], *range(8))      # what may stand in the third hint slot


def fast_and_slow(config, run, arm, seed, base, stage_steps):
    """Three stages; in each, answers must obey a rule that nobody names (arXiv 2605.12484). Logs the success of the deployed pair.

    Fast: every 6 steps the population, at most 4 words for the hint slot, and 4 random others are tried on 8 prompts each; those with
    at least half of the best one's reward live on. Slow: GRPO, each group's answers spread over the population.
    """
    phase, model, device = f"{arm} {seed}", copy.deepcopy(base), base.lm_head.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    rng, generator, kept = random.Random(seed), torch.Generator().manual_seed(seed), dict(population=[NOHINT], sampled=0)
    for step in run.loop(phase, 3 * stage_steps, model, optimizer, rng, generator, kept):
        rule, population = step // stage_steps, kept["population"]
        train_pairs, test_pairs = crossing(rule)

        def attempt(pairs, words):
            """One answer to each pair with its word in the hint slot -> the rollout, rewards (B,)."""
            rollout = generate(model, [plain(p, w) for p, w in zip(pairs, words)], 1, ANSWER, stop=EOS, generator=generator)
            kept["sampled"] += int(rollout.mask.sum())
            return rollout, torch.tensor([reward(p, t) * renames(t, rule) for p, t in zip(pairs, rollout.tokens())], device=device)

        if "fast" in arm and step % 6 == 0:
            trial = population + rng.sample([w for w in SLOTS if w not in population], 4)
            _, rewards = attempt(rng.choices(train_pairs, k=8) * len(trial), [w for w in trial for _ in range(8)])
            ranked = sorted(zip(rewards.view(-1, 8).mean(1).tolist(), trial), key=lambda x: -x[0])
            population = kept["population"] = [w for s, w in ranked if s >= ranked[0][0] / 2][:4]
        if "slow" in arm:
            pairs = [p for p in rng.choices(train_pairs, k=config.batch // config.group) for _ in range(config.group)]
            rollout, rewards = attempt(pairs, [population[i % len(population)] for i in range(config.batch)])
            y, mask = rollout.ids[:, PROMPT:], rollout.mask[:, PROMPT:]
            step_of(optimizer, loss_of("grpo", answer_logprobs(model, rollout.ids, config), None, y, mask, rewards, rule_task(rule), config))
        if (step + 1) % 5 == 0 or (step + 1) % stage_steps == 0:
            answers = answer(model, test_pairs, lambda p: plain(p, population[0]), 4, 10_000 + 1000 * seed + step)
            success = sum(reward(p, t) * renames(t, rule) for p, t in answers) / len(answers)
            run.log(phase="train", arm=arm, seed=seed, step=step + 1, stage=rule, sampled_tokens=kept["sampled"], **{"pass@1": success}, word=population[0])
            run.bar.set_postfix_str(f"stage {rule}, pass@1 {success:.2f}, word {population[0]}")


@torch.no_grad()
def continuation(student, teacher, task, eps, length, config, seed, n=1024):
    """TRB's probe: success of answers whose first `length` tokens are blended with budget eps and whose rest the teacher writes."""
    pairs = (task.test * (n // len(task.test) + 1))[:16 if config.quick else n]
    prompts, generator = [plain(p) for p in pairs], torch.Generator().manual_seed(seed)
    y, mask, _ = write_together(student, teacher, prompts, prompts, blended(eps), generator, limit=length)
    begun = [row[:n] for row, n in zip(y.tolist(), mask.sum(1).int().tolist())]
    rest = generate(teacher, [p + b for p, b in zip(prompts, begun)], 1, ANSWER - length, stop=EOS, generator=generator).tokens()
    return sum(reward(p, b if b[-1] == EOS else b + r) for p, b, r in zip(pairs, begun, rest)) / len(pairs)


# ---------------------------------------------------------------------------------------------------------------------------
# Real checkpoints: the same divergences between two models of any size on prompts of any length, by one process or several

LOGITS = 2 ** 26        # (tokens, V) log-probabilities at once: 256 MiB, a few times over


def task_of(config):
    return word_problems(config.init, config.data, config.template, config.chat, answers=False)


def load_pair(config, device):
    """The student, in fp32, and its frozen teacher. UserError if their tokenizers differ, or if they cannot hold the task."""
    mine, its = load_tokenizer(config.init), load_tokenizer(config.teacher)
    if (mine._mergeable_ranks, mine._special_tokens) != (its._mergeable_ranks, its._special_tokens):
        raise UserError(f"--teacher {config.teacher}: its vocabulary is not that of --init {config.init}")
    student, teacher = (checkpoint_for(task_of(config), f"--{what}", getattr(config, what), config.max_new_tokens, dtype).to(device)
                        for what, dtype in (("init", torch.float32), ("teacher", getattr(torch, config.dtype))))
    c, V = student.config, student.config.vocab_size
    if teacher.config.vocab_size < V:
        raise UserError(f"--teacher {config.teacher}: has {teacher.config.vocab_size} ids, the student {V}")
    if config.top > V:
        raise UserError(f"--top {config.top}: {config.init} has {V} ids")
    positions = task_of(config).longest + config.max_new_tokens
    need_memory(8 * c.n_layer * c.n_kv_head * c.head_dim * config.batch // world()[1] * positions, f"--batch {config.batch}: keys and values of so many answers", device)
    teacher.lm_head.weight = torch.nn.Parameter(teacher.lm_head.weight[:V])
    teacher.requires_grad_(False)
    student.checkpointing = config.checkpointing
    return student, teacher


def token_divergence(model, teacher, rollout, kind, config):
    """D of every answer token of a rollout, row by row (N,), with gradients to the student.

    Two log-probabilities of the token that stands there are enough for token and sampled. The other kinds need whole distributions: they are
    made of so many tokens at once as LOGITS allows, and once more in the backward pass.
    """
    x, own = rollout.ids[:, :-1], rollout.mask[:, 1:] > 0
    y, logprobs = rollout.ids[:, 1:][own], lambda m, h: m.lm_head(h).float().log_softmax(-1)[None]      # (N,); (1, n, V)
    with torch.autocast(y.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        h = model.hidden(x)[own]                                        # (N, C)
        with torch.no_grad():
            g = teacher.hidden(x)[own] if kind != "token" else None     # (N, the teacher's C)
        if kind in ("token", "sampled"):        # as if the vocabulary had one token: (1, N, 1)
            logp = token_logprobs(h, model.lm_head.weight, y)[0][None, :, None]
            logq = token_logprobs(g, teacher.lm_head.weight, y)[0][None, :, None] if kind == "sampled" else None
            return divergence(logp, logq, torch.zeros_like(y)[None], kind)[0]
        whole = lambda h, g, y: divergence(logprobs(model, h), logprobs(teacher, g), y[None], kind, config.top)[0]
        parts = zip(*(t.split(max(1, LOGITS // model.config.vocab_size)) for t in (h, g, y)))
        return torch.cat([checkpoint(whole, *part, use_reentrant=False) for part in parts])


def sample(model, problems, config, generator, mine=slice(None)):
    """-> Rollout of one answer to each of the problems at `mine`, this process's slice of them."""
    dtype, task = getattr(torch, config.dtype), task_of(config)
    sampling = model if model.lm_head.weight.dtype == dtype else copy.deepcopy(model).to(dtype)
    first, end, _ = mine.indices(len(problems))
    skip_draws(first, config, generator)
    rollout = generate(sampling, [task.prompt(p) for p in problems[mine]], 1, config.max_new_tokens, stop=task.tokenizer.stop, generator=generator)
    skip_draws(len(problems) - end, config, generator)
    return rollout


def distil(model, teacher, optimizer, rollout, kind, config):
    """A gradient step on the mean of D over the answer tokens of all processes -> that loss, the gradient's norm."""
    tokens, total = all_sum(rollout.mask.sum()), 0.0
    optimizer.zero_grad()
    for rows in torch.arange(len(rollout.ids)).split(config.micro_batch):
        loss = token_divergence(model, teacher, rollout[rows], kind, config).sum() / tokens
        loss.backward()
        total += loss.item()
    sum_gradients(model)
    total = all_sum(torch.tensor(total, dtype=torch.float64)).item()
    return total, descend(optimizer, total)


@torch.no_grad()
def held_out(model, teacher, config, seed):
    """One answer of the student to each held-out question: reverse KL to the teacher per token, length, and pass@1 where the answers are known."""
    task, generator, sums = task_of(config), torch.Generator().manual_seed(seed), torch.zeros(3, dtype=torch.float64)
    problems = task.held_out(random.Random("held out"), config.eval_prompts)
    mine = share(len(problems))
    skip_draws(mine.start, config, generator)
    for i in range(mine.start, mine.stop, config.micro_batch):
        part = problems[i:min(i + config.micro_batch, mine.stop)]
        rollout = sample(model, part, config, generator)
        kl = token_divergence(model, teacher, rollout, "reverse", config).sum()
        right = sum(task.judge(p, text, True) for p, text in zip(part, rollout.texts(task.tokenizer)))
        sums += torch.tensor([kl, rollout.mask.sum(), right])
    kl, tokens, right = all_sum(sums).tolist()
    return dict(kl=kl / tokens, length=tokens / len(problems)) | ({"pass@1": right / len(problems)} if task.judged else {})


def train_checkpoint(config, run, arm, seed, base, teacher):
    """A row of REAL from the base for config.steps steps -> the trained model. One row of metrics a step."""
    # 1. A copy of the base, two random streams: questions, and answers
    writer, _, kind, _, _ = METHODS[arm]
    phase, model, rng, generator = f"{arm} {seed}", copy.deepcopy(base), random.Random(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    fresh, kept = 10_000 + 1000 * seed, dict(sampled=0)
    if phase not in run.state:
        run.log(phase="train", arm=arm, seed=seed, step=0, sampled_tokens=0, **held_out(model, teacher, config, fresh))
    for step in run.loop(phase, config.steps, model, optimizer, rng, generator, kept):
        started = time.time()
        for g in optimizer.param_groups:
            g["lr"] = config.lr * min(1, (step + 1) / 5)
        # 2. Questions, answers, a step
        problems = [task_of(config).draw(rng) for _ in range(config.batch)]
        rollout = sample(teacher if writer == "teacher" else model, problems, config, generator, share(config.batch))
        loss, norm = distil(model, teacher, optimizer, rollout, kind, config)
        tokens, seconds = int(all_sum(rollout.mask.sum())), time.time() - started
        kept["sampled"] += tokens
        # 3. Log
        row = dict(loss=loss, grad_norm=norm, sampled_tokens=kept["sampled"], seconds=seconds, tokens_per_s=tokens / seconds)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            row |= held_out(model, teacher, config, fresh + step + 1)
            run.bar.set_postfix_str(", ".join(f"{k} {row[k]:.3f}" for k in ("loss", "kl", "pass@1") if k in row))
        run.log(phase="train", arm=arm, seed=seed, step=step + 1, **row)
    return model


# ---------------------------------------------------------------------------------------------------------------------------
# Figures and claims

def measured(run, arm, key, **where):
    """A metric of an arm -> the steps at which all its seeds have it (n,), values (seeds, n); n is 0 if a seed never has it."""
    x, y = series(run, key, phase="train", arm=arm, **where)
    seeds = len({r["seed"] for r in run.rows if r.get("arm") == arm})
    return (x, y) if len(y) == seeds else (x[:0], np.empty((seeds, 0)))


def end(run, arm, key="pass@1"):
    """The mean of a metric over the last third of an arm's steps, of each seed (seeds,); nan where it was never measured."""
    x, y = measured(run, arm, key)
    return y[:, x > x[-1] * 2 / 3].mean(1) if len(x) else np.full(len(y), math.nan)


def at(run, arm, step, key="pass@1"):
    """A metric at the first evaluation at or after a step (one, or one of each seed; nan for inf), or at the last one, of each seed (seeds,)."""
    x, y = measured(run, arm, key)
    step = np.broadcast_to(step if len(x) else math.inf, len(y))
    if not np.isfinite(step).any():
        return np.full(len(y), math.nan)
    return np.where(np.isfinite(step), y[range(len(y)), np.searchsorted(x, np.minimum(step, x[-1]))], math.nan)


def first_at(run, arm, level, key="pass@1", unit="sampled_tokens", **where):
    """Where a metric first reaches a level, of each seed (seeds,), in tokens or steps (linear between evaluations), or inf."""
    steps, y = measured(run, arm, key, **where)
    x = np.tile(steps, (len(y), 1)) if unit == "step" else series(run, unit, phase="train", arm=arm, **where)[1]
    first = np.full(len(y), math.inf)
    for seed, above in enumerate(y >= level):
        if above.any():
            i = above.argmax()
            part = 1 if i == 0 else (level - y[seed, i - 1]) / (y[seed, i] - y[seed, i - 1])
            first[seed] = x[seed, i] - (1 - part) * (x[seed, i] - x[seed, max(0, i - 1)])
    return first


def over(a, b):
    """a / b, of each seed (seeds,); nan, of which no claim holds, where either was never reached or b is 0."""
    good = np.isfinite(a) & np.isfinite(b) & (b != 0)
    return np.where(good, a / np.where(good, b, 1), math.nan)


def alive(run, arm, value):
    """value (seeds,), but nan for a seed that is never right at the end: who writes nothing writes nothing wrong."""
    return np.where(end(run, arm) > 0, value, math.nan)


def early(run, arm, rival, steps=40):
    """pass@1 of an arm minus a rival's, each the mean of steps 1 to `steps`; the same of as many sampled tokens: what the thriftier one needs
    for these steps. Both of each seed (seeds,)."""
    (x, ours), (_, theirs) = (series(run, "pass@1", phase="train", arm=a) for a in (arm, rival))
    spent = [series(run, "sampled_tokens", phase="train", arm=a)[1] for a in (arm, rival)]
    part, by_tokens = (x > 0) & (x <= steps), []
    for seed in range(len(ours)):
        budget = min(tokens[seed, part][-1] for tokens in spent)
        means = [np.interp(np.linspace(0, budget, 200), tokens[seed], y[seed]).mean() for tokens, y in zip(spent, (ours, theirs))]
        by_tokens.append(means[0] - means[1])
    return (ours - theirs)[:, part].mean(1), np.array(by_tokens)


def curves(ax, run, arms, key, title, ylabel, unit="sampled_tokens"):
    """A metric of each arm against the tokens sampled so far, or against steps."""
    for i, arm in enumerate(arms):
        x, y = series(run, key, phase="train", arm=arm)
        if unit != "step":
            steps, tokens = series(run, unit, phase="train", arm=arm)
            x = tokens.mean(0)[np.searchsorted(steps, x)] / 1e3
        band(ax, x, y, arm, color=f"C{i}", ls="-" if i < 10 else "--")
    ax.set(title=title, xlabel="step" if unit == "step" else "sampled tokens (thousands)", ylabel=ylabel, ylim=(-0.02, 1.02))


def run_arms(config, run, arms, base, expert, task, **more):
    for seed in seeds_of(config):
        for arm in arms:
            train(config, run, arm, seed, base, task, expert=expert, **more)


def figure_family(config, run, device):
    arms = config.methods
    task, base, expert = far_task(), from_scratch(config, run, "base", device), from_scratch(config, run, "expert", device)
    run.log_once(lambda: evaluate(expert, task, config, 0), phase="expert", step=0)
    run_arms(config, run, arms, base, expert, task)
    level = next(r["pass@1"] for r in run.rows if r["phase"] == "expert")
    fig, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    curves(axes[0], run, arms, "pass@1", "Success (dotted: the expert)", "held-out pass@1")
    axes[0].axhline(level, color="k", ls=":", lw=1)
    curves(axes[1], run, arms, "password_rate", "Leak: passwords that nobody can know", "fraction of answers")
    curves(axes[2], run, arms, "formal", "Drift: style A, which means nothing (base .25)", "fraction of style words")
    axes[1].legend(ncols=2, loc="upper left")
    if config.arms:
        return fig, []
    opd, sft, grpo, start = *(end(run, arm) for arm in ("opd", "sft", "grpo")), at(run, "opd", 0)
    leak = {arm: end(run, arm, "password_rate") for arm in ("opsd", "opsd_clip", "rmsd")}
    fast, slow, n = first_at(run, "opd", 0.85), first_at(run, "grpo", 0.85), config.seeds
    spent = series(run, "sampled_tokens", phase="train", arm="grpo")[1][:, -1]
    never = " (at least: not all seeds get there)" * bool(np.isinf(slow).any())
    peak = series(run, "pass@1", phase="train", arm="opsd")[1].max(1).mean()
    fig.suptitle(f"pass@1 at the end: opd {opd.mean():.2f}, sft {sft.mean():.2f}, grpo {grpo.mean():.2f}. "
                 f"Passwords: opsd {leak['opsd'].mean():.2f}, opsd_clip {leak['opsd_clip'].mean():.2f}, rmsd {leak['rmsd'].mean():.2f} ({n} seeds)")
    qwen, gkd, privileged, rmsd = "Qwen3, arXiv 2505.09388, table 21", "Agarwal et al., arXiv 2306.13649", "arXiv 2605.11182", "Applied Compute 2026"
    return fig, [
        claim("opd", "OPD, pass@1 at the end (the base that OPD and GRPO start from; GRPO)", qwen, "74.4 (55.0; 67.6)", opd, ">=", 0.94, n,
              f" ({start.mean():.2f}; {grpo.mean():.2f})"),
        claim("opd grpo", "OPD minus GRPO at the end", qwen, "6.8 points", opd - grpo, ">=", 0.02, n),
        claim("opd expert", "expert minus OPD", "Lu and Thinking Machines 2025", "-", alive(run, "opd", level - opd), "<=", 0.04, n, f" ({level:.3f})"),
        claim("sft", "SFT on the expert's answers, pass@1 at the end", "design of the task", "-", sft, ">=", 0.88, n),
        claim("sft plateau", "OPD minus SFT at the end", gkd, "on-policy is better", opd - sft, ">=", 0.005, n),
        claim("grpo tokens", f"sampled tokens to .85, GRPO over OPD{never}", qwen, "10x (GPU hours)", over(np.minimum(slow, spent), fast), ">=", 2.5, n),
        claim("opsd leak", "OPSD, rate of passwords at the end (peak of pass@1)", privileged, "fails", leak["opsd"], ">=", 0.3, n, f" ({peak:.2f})"),
        claim("clip leak", "OPSD with clip, rate of passwords, worst seed", "arXiv 2601.18734, code", "clip added", alive(run, "opsd_clip", leak["opsd_clip"]).max(), "<=", 0.02, n),
        claim("clip", "OPSD with clip, pass@1 at the end", "arXiv 2601.18734, code", "clip added", end(run, "opsd_clip"), ">=", 0.83, n),
        claim("rmsd leak", "RMSD, rate of passwords, worst seed", rmsd, "-", alive(run, "rmsd", leak["rmsd"]).max(), "<=", 0.02, n),
        claim("rmsd", "RMSD, pass@1 at the end", rmsd, "-", end(run, "rmsd"), ">=", 0.83, n)]


def figure_checkpoints(config, run, student, teacher):
    for seed in seeds_of(config):
        for arm in config.methods:
            trained = train_checkpoint(config, run, arm, seed, student, teacher)
            if world()[0] == 0:
                trained.save_pretrained(run.dir / f"{arm} {seed}", like=config.init, stop=task_of(config).tokenizer.stop)
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for ax, (key, label) in zip(axes, {"kl": "reverse KL to the teacher (nats per token)", "pass@1" if task_of(config).judged else "length": ""}.items()):
        for arm in config.methods:
            band(ax, *series(run, key, phase="train", arm=arm), arm)
        ax.set(title="The student's answers to held-out questions", xlabel="step", ylabel=label or key)
        ax.legend()
    ends = {arm: series(run, "kl", phase="train", arm=arm)[1][:, [0, -1]] for arm in config.methods}      # (seeds, 2)
    fig.suptitle(f"{Path(config.init).name} taught by {Path(config.teacher).name} ({config.seeds} seed{'s' * (config.seeds > 1)})")
    return fig, [claim(arm, f"{arm}: held-out KL to the teacher, end over start, worst seed", "-", "-", (kl[:, 1] / kl[:, 0]).max() if kl.all() else math.nan,
                       "<=", 0.9, config.seeds, f" ({kl[:, 0].mean():.3g}, {kl[:, 1].mean():.3g})") for arm, kl in ends.items()]


def figure_cold(config, run, device):
    arms, budgets, lengths = config.methods, (0, 0.02, 0.1, 0.3, 1.0), (2, 4, 6)
    task, base, cold, expert = far_task(), *(from_scratch(config, run, name, device) for name in ("base", "cold base", "expert"))
    config = replace(config, eval_every=min(config.eval_every, 5))
    run_arms(config, run, arms, cold, expert, task)
    for seed, length, eps in itertools.product(seeds_of(config), lengths, budgets):
        run.log_once(lambda: {"pass@1": continuation(base, expert, task, eps, length, config, seed)}, phase="probe", seed=seed, step=0, length=length, eps=eps)
    probe = np.array([r["pass@1"] for r in run.rows if r["phase"] == "probe"]).reshape(-1, len(lengths), len(budgets))      # (seeds, lengths, budgets)
    fig, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    curves(axes[0], run, arms, "pass@1", "Trained from the cold base", "held-out pass@1", unit="step")
    axes[0].legend()
    for i, length in enumerate(lengths):
        band(axes[1], np.arange(len(budgets)), probe[:, i], f"first {length} tokens blended", marker="o")
    axes[1].set(title="TRB's probe (warm base): the expert completes an answer", xlabel="KL budget (nats per token)", ylabel="pass@1")
    axes[1].set_xticks(range(len(budgets)), budgets)
    axes[1].legend()
    n, step = config.seeds, min(20, config.steps)
    base_level, grpo, opd = at(run, "opd", 0), at(run, "grpo", step), at(run, "opd", step)
    fig.suptitle(f"From a base that is right in {base_level.mean():.3f} of its answers: after {step} steps grpo is at {grpo.mean():.2f}, opd at {opd.mean():.2f} ({n} seeds)")
    gain, last = probe[:, 1, 2] - probe[:, 1, 0], series(run, "changed", phase="train", arm="skd")[1]
    (trb, trb_tokens), (skd, skd_tokens) = early(run, "trb", "opd"), early(run, "skd", "opd")
    plyusov, xu = "Plyusov et al., arXiv 2605.31159", "Xu et al., arXiv 2410.11325"
    return fig, [
        claim("grpo", f"OPD minus GRPO, pass@1 at step {step}", "design of the task", "-", opd - grpo, ">=", 0.5, n, f" ({opd.mean():.2f}, {grpo.mean():.2f})"),
        claim("opd", f"OPD, pass@1 at step {step}", "design of the task", "-", opd, ">=", 0.60, n),
        claim("probe", "TRB's probe: gain of eps .1 over 0, 4 tokens", plyusov, "positive", gain, ">=", 0.08, n),
        claim("probe monotone", "TRB's probe: smallest step up in eps", plyusov, "grows", np.diff(probe).min((1, 2)), ">", 0, n),
        claim("trb", "TRB minus OPD, mean pass@1 of steps 1 to 40", plyusov, "+0.4 to +0.9 points", trb, ">", 0, n),
        claim("trb tokens", "the same at equally many sampled tokens", plyusov, "-", trb_tokens, ">", 0, n),
        claim("trb end", "TRB minus OPD at the end", plyusov, "+0.4 to +0.9 points", alive(run, "opd", end(run, "trb") - end(run, "opd")), ">=", -0.02, n),
        claim("skd", "SKD minus OPD, mean pass@1 of steps 1 to 40", xu, "better", skd, ">", 0, n),
        claim("skd tokens", "the same at equally many sampled tokens", xu, "-", skd_tokens, ">", 0, n),
        claim("skd anneals", "SKD: tokens replaced, last third over first evaluation", xu, "falls by itself",
              over(end(run, "skd", "changed"), last[:, 0]), "<=", 0.33, n)]


def figure_estimators(config, run, device):
    arms = config.methods
    run_arms(config, run, arms, from_scratch(config, run, "base", device), from_scratch(config, run, "expert", device), far_task(), greedy=True)
    fig, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    curves(axes[0], run, arms, "pass@1", "Sampled at temperature 1", "held-out pass@1", unit="step")
    curves(axes[1], run, arms, "greedy", "Greedy", "held-out pass@1", unit="step")
    curves(axes[2], run, arms, "style_mass", "Where four words are equally good (dotted: 1/e)", "probability of the four", unit="step")
    axes[2].axhline(1 / math.e, color="k", ls=":", lw=1)
    axes[1].legend(loc="lower center")
    raw, greedy, n = end(run, "opd_top4"), end(run, "opd_top4", "greedy"), config.seeds
    fig.suptitle(f"A raw top-{config.top} KL (opd_top4) at the end: greedy {greedy.mean():.2f}, sampled {raw.mean():.2f} ({n} seeds)")
    source, gkd = "arXiv 2605.11182", "Agarwal et al., arXiv 2306.13649"
    return fig, [
        claim("raw sampled", f"top {config.top}, raw: greedy minus sampled pass@1 at the end (each; probability of the four words)", source, "biased gradient",
              greedy - raw, ">=", 0.75, n, f" ({greedy.mean():.2f}, {raw.mean():.2f}; {end(run, 'opd_top4', 'style_mass').mean():.2f})"),
        claim("raw greedy", f"top {config.top}, raw: greedy pass@1 at the end", source, "-", greedy, ">=", 0.95, n),
        *(claim(arm, f"{arm}: sampled pass@1 at the end", origin, "-", end(run, arm), ">=", 0.92, n) for arm, origin in zip(arms, (
            gkd, "Lu and Thinking Machines 2025", gkd, gkd, source, "arXiv 2604.13016")))]


def figure_few(config, run, device):
    arms = config.methods
    run_arms(config, run, arms, from_scratch(config, run, "base", device), from_scratch(config, run, "expert", device), far_task(train=24))
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    opd, sft, grpo = (end(run, arm) for arm in ("opd", "sft", "grpo"))
    curves(ax, run, arms, "pass@1", f"24 training prompts: opd ends at {opd.mean():.2f}, sft at {sft.mean():.2f}, grpo at {grpo.mean():.2f} ({config.seeds} seeds)", "held-out pass@1")
    ax.legend()
    return fig, [
        claim("opd", "OPD minus SFT at the end", "Lu and Thinking Machines 2025", "one prompt suffices", opd - sft, ">=", 0.05, config.seeds, f" ({opd.mean():.2f}, {sft.mean():.2f})"),
        claim("sft", "SFT minus GRPO at the end", "design of the task", "-", sft - grpo, ">=", 0.03, config.seeds, f" ({grpo.mean():.2f})")]


def figure_selfteach(config, run, device):
    base, far, rule = from_scratch(config, run, "base", device), far_task(), rule_task()
    secret = config.methods[:6]         # the others are trained under names of their own
    named = {f"{method}, rule": method for method in ("opsd", "rmsd", "grpo")}
    teachers = {"pedagogue": base, "pedagogue, reward only": None}
    run_arms(config, run, secret, base, None, far)
    short = lambda steps, every=config.eval_every: replace(config, steps=min(config.steps, steps), eval_every=min(config.eval_every, every))
    for seed in seeds_of(config):
        for arm, method in named.items():
            train(replace(short(100, 2), lr=0.3 * config.lr), run, arm, seed, base, rule, method=method)
        for arm, meter in teachers.items():
            pedagogue = train(short(50), run, arm, seed, base, far, method="grpo", prompt=told, meter=meter)
            student = "pedagogical" + arm.removeprefix("pedagogue")
            method = "pedagogical" if meter else "pedagogical_no_gate"
            train(short(100), run, student, seed, base, far, method=method, pedagogue=pedagogue)
    fig, axes = plt.subplots(2, 3, figsize=(16, 9), layout="constrained")
    curves(axes[0, 0], run, secret, "pass@1", "The hint is a password: success", "held-out pass@1")
    curves(axes[0, 1], run, secret, "password_rate", "The hint is a password: leak", "fraction of answers")
    students = ["pedagogical", "pedagogical, reward only"]
    curves(axes[0, 2], run, students, "pass@1", "Pedagogical RL, the student (without its teacher's tokens)", "held-out pass@1")
    curves(axes[1, 0], run, named, "renamed", "The hint is a rule: the place is renamed", "of the answers that name it", unit="step")
    curves(axes[1, 1], run, named, "formal", "The hint is a rule: drift to style A", "fraction of style words", unit="step")
    curves(axes[1, 2], run, teachers, "password_rate", "Pedagogical RL, its teacher: passwords", "fraction of answers")
    for ax in axes.flat:
        ax.legend()
    n, (fast, slow) = config.seeds, (first_at(run, f"{arm}, rule", 0.9, "renamed", "step") for arm in ("rmsd", "opsd"))
    drift = lambda arm, step: at(run, arm, step, "formal") - at(run, arm, 0, "formal")
    last = {arm: at(run, arm, config.steps, "password_rate") for arm in teachers}
    password = {arm: end(run, arm, "password_rate") for arm in secret}
    fig.suptitle(f"Its own teacher (opsd): a shared rule is obeyed in {end(run, 'opsd, rule', 'renamed').mean():.2f} of the answers that name the place, "
                 f"a password that cannot be known is told in {password['opsd'].mean():.2f} ({n} seeds)")
    privileged, rmsd, pedagogy = "arXiv 2605.11182", "Applied Compute 2026", "Chakraborty et al. 2026"
    return fig, [
        claim("rule", "OPSD, shared rule: obeyed where the place is named", privileged, "works", end(run, "opsd, rule", "renamed"), ">=", 0.9, n),
        claim("rule off topic", "OPSD, shared rule: aliases where none belong", rmsd, "specificity .93",
              alive(run, "opsd, rule", end(run, "opsd, rule", "off_topic")), "<=", 0.05, n),
        claim("password", "OPSD, password: rate of passwords (pass@1)", privileged, "fails", password["opsd"], ">=", 0.3, n, f" ({end(run, 'opsd').mean():.2f})"),
        claim("live", "the same, live teacher (pass@1)", "arXiv 2601.18734", "freeze it", password["opsd_live"], ">=", 0.3, n, f" ({end(run, 'opsd_live').mean():.2f})"),
        claim("no judge", "RMSD without a judge: rate of passwords", rmsd, "-", password["rmsd_no_judge"], ">=", 0.3, n),
        claim("judge", "RMSD: rate of passwords (pass@1)", rmsd, "-", alive(run, "rmsd", password["rmsd"]), "<=", 0.02, n, f" ({end(run, 'rmsd').mean():.2f})"),
        claim("clip", "OPSD with clip: rate of passwords (pass@1)", "arXiv 2601.18734, code", "clip added", alive(run, "opsd_clip", password["opsd_clip"]), "<=", 0.02, n, f" ({end(run, 'opsd_clip').mean():.2f})"),
        claim("rmsd faster", "steps to .9 on the rule, RMSD over OPSD", rmsd, "about half", over(fast, slow), "<=", 0.8, n, f" ({fast.mean():.0f}, {slow.mean():.0f})"),
        claim("rmsd drift", "drift to style A by then, RMSD over OPSD", rmsd, "-", over(drift("rmsd, rule", fast), drift("opsd, rule", slow)), "<=", 0.5, n),
        claim("rmsd drift end", "the same at the end of the run", rmsd, "-", over(drift("rmsd, rule", 100), drift("opsd, rule", 100)), "<=", 0.5, n),
        claim("grpo", "GRPO on the rule: never samples what it needs", rmsd, "RL never sees it", end(run, "grpo, rule", "renamed"), "<=", 0.02, n),
        claim("pedagogue", "pedagogue: rate of passwords, worst seed", pedagogy, "-", alive(run, "pedagogue", last["pedagogue"]).max(), "<=", 0.05, n),
        claim("pedagogue reward", "the same, trained on the reward only, mean", pedagogy, "-", last["pedagogue, reward only"], ">=", 0.9, n),
        claim("pedagogical", "Pedagogical RL, student's pass@1 (no proximity, no gate)", pedagogy, "+40% relative", end(run, "pedagogical"), ">=", 0.8, n,
              f" ({end(run, 'pedagogical, reward only').mean():.2f})")]


def figure_fastslow(config, run, device):
    arms, stage = ["fast and slow", "slow", "fast"], 2 if config.quick else 60
    base = from_scratch(config, run, "base", device)
    for seed in seeds_of(config):
        for arm in arms:
            fast_and_slow(config, run, arm, seed, base, stage)
    fig, axes = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    curves(axes[0], run, arms, "pass@1", "", "held-out pass@1 under the stage's rule", unit="step")
    for i in (1, 2):
        axes[0].axvline(i * stage, color="k", lw=0.5)
    axes[0].legend()
    ends, first = {}, {arm: first_at(run, arm, 0.75, stage=0) for arm in arms}
    for color, arm in enumerate(arms):
        x, y = series(run, "pass@1", phase="train", arm=arm)
        ends[arm] = y[:, np.isin(x, [stage, 2 * stage, 3 * stage])]      # (seeds, stages)
        spent, y = (series(run, key, phase="train", arm=arm, stage=0)[1] for key in ("sampled_tokens", "pass@1"))
        axes[1].plot(spent.T / 1e3, y.T, color=f"C{color}", lw=1, marker=".")
    both, slow, n = first["fast and slow"], np.minimum(first["slow"], series(run, "sampled_tokens", phase="train", arm="slow", stage=0)[1][:, -1]), config.seeds
    never = " (at least: not all seeds get there)" * bool(np.isinf(first["slow"]).any())
    ratio, learnt = over(slow, both), {arm: (e >= 0.75).sum() for arm, e in ends.items()}
    axes[0].set_title(f"Stages learnt, of {3 * n}: " + ", ".join(f"{arm} {n}" for arm, n in learnt.items()))
    axes[1].axhline(0.75, color="k", ls=":", lw=1)
    axes[1].set(title="First stage, each seed: tokens to .75, slow over both: " + ", ".join(f"{r:.1f}" for r in ratio), xlabel="sampled tokens (thousands)",
                ylabel="held-out pass@1", ylim=(-0.02, 1.02))
    source = "Tiwari et al., arXiv 2605.12484"
    return fig, [
        claim("both", f"stages at .75 or more, fast and slow (of {3 * n})", source, "all 3", learnt["fast and slow"], ">=", 3 * n, n),
        claim("slow", "stages of three at .75 or more, both minus weights only", source, "weights stall",
              (ends["fast and slow"] >= 0.75).sum(1) - (ends["slow"] >= 0.75).sum(1), ">=", 1, n, f" ({learnt['slow']} of {3 * n})"),
        claim("fast", "pass@1 at the ends of the stages, both minus prompt only", source, "lower ceiling", (ends["fast and slow"] - ends["fast"]).mean(1), ">", 0, n,
              f" ({learnt['fast']} of {3 * n})"),
        claim("speed", f"tokens to .75 in the first stage, weights only over both, worst seed{never}", source, "1.4 to 3 (steps)", ratio.min(), ">=", 1.4, n,
              f" ({', '.join(f'{r:.1f}' for r in ratio)})")]


def main():
    config = parse_args(Config, __doc__)
    config.seeds = config.seeds or (1 if config.quick or config.init else 2 if config.figure == "family" else 3)
    device = pick_device(config.device)
    if config.init:         # the toy takes one process: Run refuses several
        join(device)
        if world()[1] > config.batch:
            raise UserError(f"{world()[1]} processes: no more than there are answers in a --batch")
    # what is impossible ends here, before anything is written
    if config.init:
        models = load_pair(config, device)
        also = [f"{arm} {seed}" for arm in config.methods for seed in seeds_of(config)]
        inputs = {f"--{name}": fingerprint(getattr(config, name)) for name in ("init", "teacher", "data")}
        for path in (Path(config.out) / name for name in also):
            if os.path.lexists(path) and (not path.is_dir() or {file.name for file in path.iterdir()} - saved_files(path)):
                raise UserError(f"{path} is not what a run of this script saved: choose another --out")
    else:
        need_room(config, device)
        models = [build(config, config.expert_embd if name == "expert" else config.n_embd, device) for name in NEEDS[config.figure]]
        also, inputs = [trained_before(config, name)[0].name for name in NEEDS[config.figure]], {}
    size = sum(p.numel() for p in models[0].parameters())
    with Run(config, also, inputs) as run:
        run.introduce(device, size)
        fig, claims = figure_checkpoints(config, run, *models) if config.init else globals()[f"figure_{config.figure}"](config, run, device)
        run.finish(fig, claims)


if __name__ == "__main__":
    command(main)
