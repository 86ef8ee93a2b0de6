"""When the answer of a cheap model is good enough: rules that are found from images without labels.

A ladder of models, the cheapest first, the last one with all tokens. An image climbs it until a model is sure: until the
log-odds of its likeliest class reach a threshold. The aim is a share of images with the same class as
on the last rung (agreement), at the least mean cost; of earlier rungs that an image has been on the cost counts, too.

Legend: R rungs but the last, I images, L classes.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

NEVER, ALWAYS = math.inf, -math.inf  # thresholds: nothing is sure enough, anything is
_FOLDS = 5
_LARGEST = 20.0  # log-odds
_HALVINGS = 40
_AIMS = 9
_MOST_BEFORE = 3  # rungs before the last: every choice is tried, of eight models already half a minute's work


class Route(NamedTuple):
    """The rungs that are used, by their numbers, ascending, the last rung of all among them only if it is needed; and for
    each the confidence with which an image stays there: that of the last one is ALWAYS."""

    rungs: tuple[int, ...]
    thresholds: tuple[float, ...]


class Expected(NamedTuple):
    """Means over images."""

    agreement: float  # with the last rung of all
    cost: float  # in the unit of the costs


def confidence(logits: Float[np.ndarray, "*rest L"]) -> Float[np.ndarray, "*rest"]:
    """Log-odds of the likeliest class, log p / (1 - p): how sure an answer is. At least -log(L - 1)."""
    ordered = np.sort(logits.astype(np.float64), axis=-1)
    return ordered[..., -1] - logsumexp(ordered[..., :-1], axis=-1)


def rung_of(route: Route, sure: Float[np.ndarray, "R I"]) -> Int[np.ndarray, " I"]:
    """On which rung each image stays."""
    found = np.full(sure.shape[1], route.rungs[-1])
    for rung, threshold in reversed([*zip(route.rungs, route.thresholds, strict=True)][:-1]):
        found = np.where(sure[rung] >= threshold, rung, found)
    return found


def expected(
    route: Route, sure: Float[np.ndarray, "R I"], agrees: Bool[np.ndarray, "R I"], costs: Sequence[float]
) -> Expected:
    """What a route comes to on these images. costs: of an image on each rung, the last one too."""
    rungs = rung_of(route, sure)
    always = np.concatenate([agrees, np.ones((1, agrees.shape[1]), bool)])
    paid = np.zeros(len(rungs))
    for rung in route.rungs:
        paid += costs[rung] * (rungs >= rung)
    return Expected(float(always[rungs, np.arange(len(rungs))].mean()), float(paid.mean()))


def cheapest(
    sure: Float[np.ndarray, "R I"], agrees: Bool[np.ndarray, "R I"], costs: Sequence[float], agreement: float
) -> Route:
    """The route of least mean cost on these images among those that agree as often as wished.

    On each rung the chance that an answer differs is a falling function of its confidence (logistic regression); an image
    stays where that is at most a risk, the same on all rungs, and the largest with which the wish is met. That is done for
    every choice of rungs, of three at most before the last. Of routes that cost the same the shortest is taken.
    """
    last, risks = len(sure), [_risk(*pair) for pair in zip(sure, agrees, strict=True)]
    found = []
    for number in range(min(last, _MOST_BEFORE) + 1):
        for used in itertools.combinations(range(last), number):
            route = _of_largest_risk([risks[rung] for rung in used], used, last, sure, agrees, costs, agreement)
            found.append((expected(route, sure, agrees, costs).cost, len(route.rungs), route))
    return min(found)[2]


def out_of_fold(
    sure: Float[np.ndarray, "R I"], agrees: Bool[np.ndarray, "R I"], costs: Sequence[float], agreement: float
) -> tuple[Expected, float]:
    """What to expect of other images: routes found on four fifths and followed on the fifth left out; and the standard
    error of the agreement."""
    fold = np.random.default_rng(0).permutation(sure.shape[1]) % _FOLDS
    parts = []
    for i in range(_FOLDS):
        kept, out = fold != i, fold == i
        route = cheapest(sure[:, kept], agrees[:, kept], costs, agreement)
        parts.append((out.sum(), expected(route, sure[:, out], agrees[:, out], costs)))
    share = np.array([number for number, _ in parts]) / len(fold)
    mean = Expected(*(float(share @ [getattr(of, name) for _, of in parts]) for name in Expected._fields))
    # Of none that differs it is not known that none does: as if one of two more did (Laplace's rule of succession).
    share_of_others = (mean.agreement * len(fold) + 1) / (len(fold) + 2)
    return mean, math.sqrt(share_of_others * (1 - share_of_others) / len(fold))


def promised(
    sure: Float[np.ndarray, "R I"], agrees: Bool[np.ndarray, "R I"], costs: Sequence[float], agreement: float
) -> tuple[Route, Expected, float]:
    """The route with which images left out agree as often as wished; what to expect of others, and its standard error.

    Routes that meet a wish on the images they are found on miss it by a point or two on others. So the aim is raised, in
    equal steps up to 1, until those left out meet the wish; where they never do, every image goes to the last rung.
    """
    for aim in np.linspace(agreement, 1.0, _AIMS):
        found, error = out_of_fold(sure, agrees, costs, float(aim))
        if found.agreement >= agreement:
            return cheapest(sure, agrees, costs, float(aim)), found, error
    return Route((len(sure),), (ALWAYS,)), Expected(1.0, float(costs[-1])), 0.0


class _Risk(NamedTuple):
    """log-odds that an answer differs: offset - slope * confidence."""

    offset: float
    slope: float

    def least(self, log_odds: float) -> float:
        """From which on the log-odds are at most so many."""
        if not math.isfinite(self.offset) or self.slope <= 0:
            return ALWAYS if self.offset <= log_odds else NEVER
        return (self.offset - log_odds) / self.slope


def _risk(sure: Float[np.ndarray, " I"], agrees: Bool[np.ndarray, " I"]) -> _Risk:
    if agrees.all() or not agrees.any():
        return _Risk(-math.inf if agrees.all() else math.inf, 0.0)
    scale = float(sure.std()) or 1.0
    fitted = LogisticRegression().fit(sure[:, None] / scale, ~agrees)
    return _Risk(float(fitted.intercept_[0]), -float(fitted.coef_[0, 0]) / scale)


def _of_largest_risk(
    risks: list[_Risk], used: tuple[int, ...], last: int, sure, agrees, costs, agreement: float
) -> Route:
    """With these rungs and the last one: the route of the largest risk that still agrees as often as wished."""

    def at(log_odds: float) -> Route:
        thresholds = (*(risk.least(log_odds) for risk in risks), ALWAYS)
        end = thresholds.index(ALWAYS) + 1  # nobody climbs on from there
        return Route((*used, last)[:end], thresholds[:end])

    low, high = -_LARGEST, _LARGEST  # nobody stays below the last rung, everybody does
    best = Route((last,), (ALWAYS,))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_met = expected(route := at(middle), sure, agrees, costs).agreement >= agreement
        low, high, best = (middle, high, route) if is_met else (low, middle, best)
    return best
