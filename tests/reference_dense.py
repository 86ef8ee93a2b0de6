"""Expediting and AiluRus in numpy, from their descriptions: one image at a time, loops, all clusters written out."""

import math

import numpy as np
from cases import attend, feed_forward


def cells_of(grid, columns):
    """For each cluster the places whose mean it begins with, and its row, its column and the columns of its row."""
    (height, width), rows = grid, len(columns)
    found = []
    for r, number in enumerate(columns):
        ys = range(math.floor(r * height / rows), math.ceil((r + 1) * height / rows))
        for c in range(number):
            xs = range(math.floor(c * width / number), math.ceil((c + 1) * width / number))
            found.append(({(y, x) for y in ys for x in xs}, r, c, number))
    return found


def sees(place, grid, rows, r, c, number, reach=2):
    """Whether a patch is to compare itself with the cluster in row r, column c of `number`."""
    own_row, own_column = place[0] * rows // grid[0], place[1] * number // grid[1]
    return abs(own_row - r) <= reach and abs(own_column - c) <= reach


def softmax(logits):
    weights = np.exp(np.asarray(logits) - max(logits))
    return weights / weights.sum()


def soft_kmeans(x, places, grid, columns, inverse_temperature, iterations=5):
    """Clusters (M, D) of tokens (N, D) that lie at `places`, and where these lie (M, 2)."""
    cells = cells_of(grid, columns)
    know = [[sees(place, grid, len(columns), *cell[1:]) for cell in cells] for place in places]
    clusters, at = [], []
    for m, (members, *_) in enumerate(cells):
        rows = [n for n, place in enumerate(places) if tuple(place) in members]
        rows = rows or [n for n in range(len(x)) if know[n][m]] or range(len(x))
        clusters.append(np.mean([x[n] for n in rows], axis=0))
        at.append(np.mean([places[n] for n in rows], axis=0))
    for _ in range(iterations):
        weights = np.zeros((len(x), len(cells)))
        for n, token in enumerate(x):
            known = [m for m in range(len(cells)) if know[n][m]]
            distances = [((token - clusters[m]) ** 2).sum() for m in known]
            weights[n, known] = softmax([-inverse_temperature * distance for distance in distances])
        for m in range(len(cells)):
            if weights[:, m].sum() > 0:
                share = weights[:, m] / weights[:, m].sum()
                clusters[m] = sum(s * token for s, token in zip(share, x, strict=True))
                at[m] = sum(s * np.asarray(place, float) for s, place in zip(share, places, strict=True))
    return np.stack(clusters), np.stack(at)


def reconstruct(x, clusters, final, inverse_temperature, number):
    """What every token of x gets of the final features of the clusters nearest to it."""
    found = []
    for token in x:
        distances = [((token - cluster) ** 2).sum() for cluster in clusters]
        chosen = sorted(range(len(clusters)), key=lambda m: distances[m])[:number]
        weights = softmax([-inverse_temperature * distances[m] for m in chosen])
        found.append(sum(w * final[m] for w, m in zip(weights, chosen, strict=True)))
    return np.stack(found)


def density_peaks(x, places, num_anchors, num_neighbors, window):
    """For each token the anchor that it merges into, by its number among the anchors, and those: numbers of tokens."""
    num = len(x)
    near = lambda i, j: all(abs(a - b) <= window // 2 for a, b in zip(places[i], places[j], strict=True))  # noqa: E731
    distance = np.array([[((a - b) ** 2).mean() ** 0.5 for b in x] for a in x])
    furthest = distance.max()
    density = []
    for i in range(num):
        known = sorted(distance[i, j] if near(i, j) else furthest for j in range(num))[:num_neighbors]
        density.append(-np.mean(np.square(known)))
    score = []
    for i in range(num):
        denser = [j for j in range(num) if near(i, j) and (-density[j], j) < (-density[i], i)]
        score.append(density[i] + np.log(min((distance[i, j] for j in denser), default=furthest)))
    anchors = sorted(sorted(range(num), key=lambda i: (-score[i], i))[:num_anchors])
    assigned = []
    for i in range(num):
        if i in anchors:
            assigned.append(anchors.index(i))
            continue
        choice = [m for m, anchor in enumerate(anchors) if near(i, anchor)] or range(num_anchors)
        assigned.append(min(choice, key=lambda m: distance[i, anchors[m]]))
    return np.array(assigned), anchors


def through(blocks, special, patches, log_size=None):
    """The special and the patch tokens behind blocks that are black boxes."""
    y = np.concatenate([special, patches])[None].astype(np.float32)
    weight = None if log_size is None else np.concatenate([np.zeros(len(special)), log_size])[None].astype(np.float32)
    for block in blocks:
        y = feed_forward(block, attend(block, y, weight)[0])
    y = np.asarray(y, np.float64)[0]
    return y[: len(special)], y[len(special) :]


def expediting(model, x, site, columns, inverse_temperature, number):
    """One image's tokens (T, D) behind all blocks."""
    x, places = np.asarray(x, np.float64), list(np.ndindex(*model.grid))
    special, patches = through(model.blocks[:site], x[: model.num_special], x[model.num_special :])
    clusters, _ = soft_kmeans(patches, places, model.grid, columns, inverse_temperature)
    special, final = through(model.blocks[site:], special, clusters)
    return np.concatenate([special, reconstruct(patches, clusters, final, inverse_temperature, number)])


def ailurus(model, x, site, num_anchors, num_neighbors, window, proportional):
    """One image's tokens (T, D) behind all blocks, and the patches that are anchors."""
    x, places = np.asarray(x, np.float64), list(np.ndindex(*model.grid))
    special, patches = through(model.blocks[:site], x[: model.num_special], x[model.num_special :])
    assigned, anchors = density_peaks(patches, places, num_anchors, num_neighbors, window)
    merged = np.stack([patches[assigned == m].mean(axis=0) for m in range(num_anchors)])
    log_size = np.log([np.sum(assigned == m) for m in range(num_anchors)])
    special, final = through(model.blocks[site:], special, merged, log_size if proportional else None)
    return np.concatenate([special, final[assigned]]), anchors
