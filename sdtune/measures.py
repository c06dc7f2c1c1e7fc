"""Measures of a fine-tuned model against its base, with their errors: means, KID, and the share of copied pictures."""

import dataclasses

import numpy as np
import torch
from scipy import stats

# A picture is a copy of its nearest training image if its distance to that is less than this part of that to the
# second nearest (arXiv 2310.02664, after Yoon et al., ICML 2023 workshop on structured probabilistic inference).
COPY_RATIO = 1 / 3
# A model memorises if more than this share of its pictures are copies. Measured on the miniature: of new drawings by
# the renderer for the captions of 8 images, which no model saw, 10 to 12 % were below 1/3 by chance, for those of 216
# images none; of a model trained on the 8 all.
COPY_SHARE = 0.25
MIN_DIFFERENT_IMAGES = 3  # fewer make no pairs without one of them, and no second nearest image that says something


def interval(values):
    """The mean of independent values, its standard error, and its 95 % interval by Student's t; of fewer than two
    values, the mean alone."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return {}
    mean = values.mean()
    if len(values) == 1:
        return {"mean": float(mean)}
    error = values.std(ddof=1) / len(values) ** 0.5
    reach = stats.t.ppf(0.975, len(values) - 1) * error
    return {
        "mean": float(mean),
        "standard_error": float(error),
        "low": float(mean - reach),
        "high": float(mean + reach),
    }


def paired(model, base=None, less_is_better=False):
    """The mean of the model's values, of the base's if there are any, and of what the model gains on it, by pairs."""
    result = {"model": interval(model)}
    if base is not None:
        gain = np.asarray(model, dtype=np.float64) - np.asarray(base, dtype=np.float64)
        result["base"] = interval(base)
        result["gain"] = interval(-gain if less_is_better else gain)
    return result


def kernel_sums(x, y):
    """For each row of x (m, d), the sum of the kernel (x.y / d + 1)^3 over the rows of y (n, d)."""
    slices = [x[first : first + 256] for first in range(0, len(x), 256)]  # as a data set may be large
    return np.concatenate([((part @ y.T / x.shape[1] + 1) ** 3).sum(1) for part in slices])


def other_kernel_sums(x):
    """For each row of x (m, d), the sum of the kernel over the other rows."""
    own = ((x * x).sum(1) / x.shape[1] + 1) ** 3
    return kernel_sums(x, x) - own


def squared_mmd(x, y):
    """The unbiased squared MMD of x (m, d) and y (n, d) under the kernel (x.y / d + 1)^3 (arXiv 1801.01401), and its
    values without each row of x (m,) and without each of y (n,). m and n are at least 3.

    It is taken over all pairs, which is the mean over all random subsets. It is negative by chance, and far below 0
    where x are copies of few of y.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    m, n = len(x), len(y)
    xx, yy = other_kernel_sums(x), other_kernel_sums(y)
    xy, yx = kernel_sums(x, y), kernel_sums(y, x)
    mean_xx, mean_yy = xx.sum() / (m * (m - 1)), yy.sum() / (n * (n - 1))
    value = mean_xx + mean_yy - 2 * xy.sum() / (m * n)
    # Without a row, the sums of its own set lose what they hold of it twice: its row, and its column.
    mean_xx_without = (xx.sum() - 2 * xx) / ((m - 1) * (m - 2))
    mean_yy_without = (yy.sum() - 2 * yy) / ((n - 1) * (n - 2))
    without_x = mean_xx_without + mean_yy - 2 * (xy.sum() - xy) / ((m - 1) * n)
    without_y = mean_xx + mean_yy_without - 2 * (xy.sum() - yx) / (m * (n - 1))
    return float(value), without_x, without_y


def jackknife_error(*groups):
    """The standard error of a statistic of independent samples, given for each its values without one of the sample's
    members (Efron and Stein 1981): the root of the sum of (n - 1) / n * sum((value - mean)^2)."""
    variance = 0.0
    for values in groups:
        n = len(values)
        variance += (n - 1) / n * np.square(values - values.mean()).sum()
    return float(variance**0.5)


def compare_kid(real, embeds, base_embeds=None):
    """KID of the model's pictures and, if not None, of the base's to real images, with standard errors, and how much
    the model's is lower. Empty where there are fewer than 3 images.

    Embeddings (n, d) have length 1 and are scaled to sqrt(d). The errors are the jackknife's: random subsets overlap,
    so that their spread over the root of their number would promise too much.
    """
    if len(real) < MIN_DIFFERENT_IMAGES:
        return {}
    scale = real.shape[1] ** 0.5
    value, *without = squared_mmd(embeds * scale, real * scale)
    result = {"model": {"mean": value, "standard_error": jackknife_error(*without)}}
    if base_embeds is None:
        return result
    base_value, *base_without = squared_mmd(base_embeds * scale, real * scale)
    result["base"] = {"mean": base_value, "standard_error": jackknife_error(*base_without)}
    # Picture k of both comes from the same prompt and noise, so that both go at once.
    gain = base_value - value
    error = jackknife_error(*[base - model for model, base in zip(without, base_without)])
    result["gain"] = {"mean": gain, "standard_error": error, "low": gain - 1.96 * error, "high": gain + 1.96 * error}
    return result


@dataclasses.dataclass
class Nearest:
    """The nearest of images that come one after the other, and the distance of the second nearest, for each query."""

    queries: torch.Tensor  # (n, f)
    distance: torch.Tensor  # (n,), of the nearest
    second: torch.Tensor  # (n,)
    index: torch.Tensor  # (n,), of the nearest

    @classmethod
    def of(cls, queries):
        """Begins, with nothing near."""
        far = torch.full((len(queries),), torch.inf)
        return cls(queries, distance=far, second=far, index=torch.full((len(queries),), -1))

    def see(self, features, first):
        """Looks at the images number `first` and on: features (k, views, f), of which the nearest view counts."""
        for number, views in enumerate(features, first):
            distance = torch.cdist(self.queries, views).amin(1)
            is_nearer = distance < self.distance
            self.second = torch.where(is_nearer, self.distance, torch.minimum(self.second, distance))
            self.distance = torch.minimum(self.distance, distance)
            self.index = torch.where(is_nearer, number, self.index)

    def ratios(self):
        """The distance to the nearest image over that to the second nearest, in [0, 1]; 1 without a second one."""
        ratios = self.distance / self.second.clamp(min=1e-9)
        return torch.where(self.second.isfinite(), ratios, 1.0).clamp(max=1.0)


def share(copies):
    """The share of True among n, and its 95 % interval (Clopper and Pearson 1934)."""
    k, n = int(np.sum(copies)), len(copies)
    low = float(stats.beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(stats.beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return {"copies": k, "pictures": n, "share": k / n, "low": low, "high": high}


def judge(num_images, copies, base_copies=None):
    """The verdict on memorising, from the number of different training images and from whether each picture is a copy,
    of the model and of the base.

    Memorising: the lower end of the model's 95 % interval is above COPY_SHARE and above the upper end of the base's,
    which never saw the images. Cleared: its upper end is at most COPY_SHARE. Between the two nobody can say.
    """
    result = {"model": share(copies)}
    limit = COPY_SHARE
    if base_copies is not None:
        result["base"] = share(base_copies)
        limit = max(limit, result["base"]["high"])
    if num_images < MIN_DIFFERENT_IMAGES:
        verdict = "cannot say: a copy shows among 3 different images at least"
    elif result["model"]["low"] > limit:
        verdict = "memorising"
    elif result["model"]["high"] <= COPY_SHARE:
        verdict = "not memorising"
    else:
        verdict = "cannot say: too few pictures, or the base comes as near"
    return {"verdict": verdict, "limit": limit, **result}
