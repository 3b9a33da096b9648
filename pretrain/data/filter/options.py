"""The settings of `clipfuse data filter`: which rules apply, and where they stop."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pretrain.config import SEED, check_numbers
from pretrain.data.captions import check_caption_source
from pretrain.data.sample_filter import parse_keep, read_skip_list
from pretrain.errors import ConfigError


@dataclass(frozen=True)
class FilterOptions:
    """Which samples go. None switches a rule off."""

    caption: str = "txt"
    """Where captions are, as data.caption says. A sample goes by a rule of captions where none of its captions passes."""
    keep: str | None = None
    """A condition on fields of the json, in the language of data.keep."""
    skip: str | None = None
    """A file of samples that go, in the format of data.skip."""
    keep_list: str | None = None
    """A file of samples, in the same format: all others go."""
    min_words: int | None = None
    """Fewest words of a caption, as white space divides it."""
    max_words: int | None = None
    """Most words of a caption."""
    max_repeats: int | None = None
    """Captions that more samples than this have go with all of these samples (Jia et al., arXiv:2102.05918)."""
    letters: bool = False
    """Captions without a letter go."""
    no_odd: bool = False
    """Captions go that `clipfuse data check` calls odd: markup, urls, file names, placeholders."""
    similarity: float | None = None
    """Least cosine of image and caption; of several captions the best counts."""
    keep_best: float | None = None
    """Share of samples that stays, those with the highest cosine of image and caption, of what other rules have left."""
    duplicates: float | None = None
    """Least cosine of two images that are near-duplicates."""
    search_clusters: int | None = None
    """Clusters of the search for near-duplicates; 0 = compare all pairs. None = by the number of samples."""
    clusters: int | None = None
    """Clusters of images among which the data is balanced."""
    per_cluster: int | None = None
    """Samples of a cluster that stay in any case; see `temperature` for larger clusters."""
    temperature: float = 0.0
    """Of a cluster of n samples, more than per_cluster = N, N (n/N)^temperature stay: N at 0, all at 1."""
    missing: str | None = None
    """What happens to samples without an embedding: drop or keep. None = drop, unless more than half have none."""
    seed: int = 0
    """Of the k-means."""
    list_only: bool = False
    """Write a list that data.skip reads instead of shards."""

    @property
    def reads_captions(self) -> bool:
        """Whether a rule looks at captions."""
        return any(value is not None for value in (self.min_words, self.max_words, self.max_repeats)) or (
            self.letters or self.no_odd
        )

    @property
    def needs_similarity(self) -> bool:
        """Whether a rule needs embeddings of captions beside those of images."""
        return self.similarity is not None or self.keep_best is not None

    @property
    def needs_embeddings(self) -> bool:
        """Whether a rule needs embeddings."""
        return self.needs_similarity or self.duplicates is not None or self.clusters is not None

    @property
    def has_rules(self) -> bool:
        """Whether any rule is set."""
        lists = (self.keep, self.skip, self.keep_list)
        return self.reads_captions or self.needs_embeddings or any(value is not None for value in lists)

    def check(self) -> None:
        """Refuse settings that do not go together. Raises ConfigError."""
        check_caption_source(self.caption, "--caption")
        if not self.has_rules:
            raise ConfigError("no rule is given, so every sample would stay: --duplicates 0.95, for example")
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise ConfigError(f"--min-words {self.min_words} is more than --max-words {self.max_words}: no caption has both")
        if (self.clusters is None) != (self.per_cluster is None):
            raise ConfigError("--clusters and --per-cluster go together: --clusters 100 --per-cluster 1000")
        if self.temperature and self.clusters is None:
            raise ConfigError("--temperature goes with --clusters and --per-cluster")
        if self.search_clusters is not None and self.duplicates is None:
            raise ConfigError("--search-clusters goes with --duplicates")
        if self.keep is not None:
            parse_keep(self.keep, "--keep")
        positive = dict.fromkeys(("min_words", "max_words", "max_repeats", "clusters", "per_cluster"), "[1, inf)")
        cosines = dict.fromkeys(("similarity", "duplicates"), "[-1, 1]")
        intervals = {"keep_best": "(0, 1]", "temperature": "[0, 1]", "search_clusters": "[0, inf)", "seed": SEED}
        check_numbers(self, "", **positive, **cosines, **intervals)
        self.describe()

    def describe(self) -> dict[str, Any]:
        """Return the settings with digests of the lists, by which a folder is resumed or refused. Raises ConfigError."""
        values = asdict(self)
        for name in ("skip", "keep_list"):
            if values[name] is not None:
                values[name] = read_skip_list(values[name], f"--{name.replace('_', '-')} ").describe()
        return values
