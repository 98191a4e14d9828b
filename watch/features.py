"""The features of two domains: numbers that say how mixed they are, and their picture in the plane."""

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data_loader import UNLABELLED
from watch.plots import SOURCE, STYLE, TARGET, class_colours, new_figure, without_frame

NEIGHBOURS = 10
FOLDS = 5
SEED = 0


def proxy_a_distance(f_s: np.ndarray, f_t: np.ndarray) -> float:
    """How well a linear classifier tells the domains apart: 2(1 − 2ε), ε its error on samples that it has not seen.

    Source: Ben-David et al., "Analysis of Representations for Domain Adaptation" (NIPS 2006); used for features in
    Ganin et al., JMLR 17(59), section 3.

    Note: the classifier is a logistic regression on standardised features, not a support vector machine; ε is the
    error over five held-out fifths. An ε above 1/2 is chance and counts as 1/2.

    Shape: (N, F), (M, F) -> a number from 0 (no better than chance) to 2 (always right)
    """
    features, domains = np.concatenate((f_s, f_t)), np.repeat((0, 1), (len(f_s), len(f_t)))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    error = np.mean(cross_val_predict(classifier, features, domains, cv=folds) != domains)
    return float(2 * (1 - 2 * min(error, 0.5)))


def neighbour_share(f_s: np.ndarray, f_t: np.ndarray, neighbours: int = NEIGHBOURS) -> float:
    """Share of each sample's nearest neighbours that come from the other domain, averaged over all samples.

    Euclidean distance in feature space, the sample itself left out.

    Shape: (N, F), (M, F) -> a number from 0 (apart) to about 0.5 (mixed, for N = M)
    """
    features, domains = np.concatenate((f_s, f_t)), np.repeat((0, 1), (len(f_s), len(f_t)))
    nearest = NearestNeighbors(n_neighbors=neighbours).fit(features).kneighbors(return_distance=False)
    return float(np.mean(domains[nearest] != domains[:, None]))


def same_class_share(f_s: np.ndarray, y_s: np.ndarray, f_t: np.ndarray, y_t: np.ndarray) -> float:
    """Share of target samples whose nearest source sample is of the same class.

    Shape: (N, F), (N,), (M, F), (M,) -> a number in [0, 1]
    """
    nearest = NearestNeighbors(n_neighbors=1).fit(f_s).kneighbors(f_t, return_distance=False)[:, 0]
    return float(np.mean(y_s[nearest] == y_t))


def plane(features: np.ndarray) -> np.ndarray:
    """t-SNE: near in feature space is near in the plane; distances between clusters mean nothing.

    Shape: (N, F) -> (N, 2)
    """
    if min(features.shape) > 50:  # van der Maaten's own first step; distances hardly change
        features = PCA(50, random_state=SEED).fit_transform(features)
    perplexity = min(30, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=SEED, n_jobs=1).fit_transform(features)


def densest(points: np.ndarray) -> np.ndarray:
    """The point with the nearest tenth of all the others closest around it: where a cluster bears its name."""
    count = max(1, len(points) // 10)
    distances, _ = NearestNeighbors(n_neighbors=count).fit(points).kneighbors(points)
    return points[distances[:, -1].argmin()]


def draw_domains(axes: Axes, points: np.ndarray, sources: int) -> None:
    """Points coloured by domain; the first `sources` are the source's."""
    colours = np.repeat((SOURCE, TARGET), (sources, len(points) - sources))
    order = np.random.default_rng(SEED).permutation(len(points))  # else one domain would cover the other
    axes.scatter(points[order, 0], points[order, 1], 5, colours[order], alpha=0.7, linewidths=0)


def draw_classes(axes: Axes, points: np.ndarray, labels: np.ndarray, sources: int, classes: tuple[str, ...]) -> None:
    """Points coloured by class, whose names stand where most of its source and of its target points are."""
    order = np.random.default_rng(SEED).permutation(len(points))
    colours = [*class_colours(len(classes)), "0.75"]  # the last one, grey, is that of UNLABELLED
    axes.scatter(points[order, 0], points[order, 1], 5, np.array(colours)[labels[order]], alpha=0.7, linewidths=0)
    places: list[np.ndarray] = []
    for part in (slice(sources), slice(sources, None)):
        for label in set(labels[part]) - {UNLABELLED}:
            place = densest(points[part][labels[part] == label])
            if all(np.abs(place - other).max() > 0.07 * np.ptp(points) for other in places):  # not over each other
                places.append(place)
                look = {"facecolor": "white", "edgecolor": colours[label], "linewidth": 1.5}
                box = {"boxstyle": "circle,pad=0.15" if len(classes[label]) == 1 else "round,pad=0.15", **look}
                x, y = place
                axes.text(x, y, classes[label], ha="center", va="center", fontsize=9, fontweight="bold", bbox=box)


@matplotlib.rc_context(STYLE)
def draw_features(
    row: tuple[Axes, Axes],
    label: str,
    f_s: np.ndarray,
    y_s: np.ndarray,
    f_t: np.ndarray,
    y_t: np.ndarray,
    classes: tuple[str, ...],
) -> dict[str, float]:
    """A network's features, coloured by domain and by class; returns the numbers beside the pictures.

    Args:
        y_t: all UNLABELLED where the target has no labels.

    Shape: (N, F), (N,), (M, F), (M,)
    """
    by_domain, by_class = row
    distance, share = proxy_a_distance(f_s, f_t), neighbour_share(f_s, f_t)
    labelled = (y_t != UNLABELLED).all()
    points = plane(np.concatenate((f_s, f_t)))
    draw_domains(by_domain, points, len(f_s))
    draw_classes(by_class, points, np.concatenate((y_s, y_t)), len(f_s), classes)
    by_domain.set_title(f"{label}, by domain: proxy A-distance {distance:.2f}")
    by_class.set_title(f"{label}, by class")
    by_domain.set_xlabel(f"other-domain neighbours {share:.1%}")
    same_class = same_class_share(f_s, y_s, f_t, y_t) if labelled else math.nan
    alike = f"nearest source sample is of the same class: {same_class:.1%} of target"
    by_class.set_xlabel(alike if labelled else "the target, in grey, has no labels")
    for axes in row:
        without_frame(axes)
    return {
        "samples": len(f_s) + len(f_t),
        "features": f_s.shape[1],
        "proxy_a_distance": round(distance, 3),
        "neighbour_share": round(share, 4),
        "same_class_share": round(same_class, 4),
    }


@matplotlib.rc_context(STYLE)
def features_figure(rows: int, source: str, target: str, samples: int) -> tuple[Figure, np.ndarray]:
    """A figure for the features of so many networks, to be drawn by `draw_features`, and its axes (rows, 2).

    Args:
        source, target: names of the domains.
        samples: how many are shown.
    """
    figure = new_figure(0.95 + 4.3 * rows)
    marks = [(SOURCE, f"{source} (source)"), (TARGET, f"{target} (target)")]
    dots = [Line2D([], [], marker="o", linestyle="", color=colour, label=label) for colour, label in marks]
    figure.legend(handles=dots, loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel(
        f"t-SNE of {samples:,} samples, half of each domain. Proxy A-distance 2(1 − 2ε), ε the held-out error of a "
        "linear domain\nclassifier: 2 where it always tells the domains apart, 0 where it can't. Other-domain "
        f"neighbours: the share of each\nsample's {NEIGHBOURS} nearest that come from the other domain: 50 % where the "
        "domains are mixed. Both in feature space.",
        fontsize=9,
        linespacing=1.4,
    )
    return figure, figure.subplots(rows, 2, squeeze=False)
