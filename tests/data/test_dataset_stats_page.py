import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from engine.data.dataset_stats import DatasetStats
from engine.data.dataset_stats_page import plots, write_page

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture
def stats():
    lengths = np.array([10, 20, 30])
    return DatasetStats(
        lengths=lengths,
        assistant_tokens=lengths // 2,
        turns=np.ones(3),
        rows_S=(0.4, 0.3),
        alive_S=(0.5, 0.3),
        saving=1.7,
        num_sampled=3,
        token_counts=np.array([20, 9, 1]),
        num_packs=1,
        max_tokens=64,
    )


def test_each_plot_is_a_drawing_of_its_own(stats):
    drawn = plots(stats)
    assert len(set(drawn)) == 4
    assert all(ElementTree.fromstring(svg).tag.endswith("svg") for svg in drawn)


def test_the_page_holds_every_figure_and_sample_and_loads_nothing(stats, tmp_path):
    path = tmp_path / "new" / "page.html"
    write_page(path, "a < b", stats, [("document 0", [("<|user|>q", False), ("a & b\n", True)])])
    page = path.read_text(encoding="utf-8")
    assert "<title>a &lt; b</title>" in page
    assert "&lt;|user|&gt;q<b>a &amp; b\n</b>" in page
    assert all(f"<td>{name.replace('_', ' ')}</td>" in page for name in stats.facts())
    assert "compaction flops ratio</td><td>1.7" in page
    assert "<script" not in page and 'src="http' not in page and "@import" not in page


def test_the_same_portrait_gives_the_same_facts(stats):
    assert stats.facts() == stats.facts()
    assert stats.facts()["empty_pack_share"] == round(1 - 60 / 64, 4)
