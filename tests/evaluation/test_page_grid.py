"""The heat maps of shapes on the page."""

import re
from pathlib import Path

import pytest

from engine.evaluation.page_grid import grid_section
from engine.evaluation.run_record import RunRecord


def cell(num_steps: int, topk: int, num_draft_tokens: int, length: float) -> dict:
    sizes = {"num_steps": num_steps, "topk": topk, "num_draft_tokens": num_draft_tokens}
    return {**sizes, "speed_up": length / 2, "reports": {"all": {"acceptance_length": length}}}


def test_each_shape_is_a_cell_and_a_longer_one_is_darker():
    grid = {"draft_cost": 0.2, "verify_cost": 0.0, "cells": [cell(3, 1, 4, 2.0), cell(3, 4, 8, 3.0), cell(3, 4, 16, 4.0)]}
    run = RunRecord(Path("run"), [], [], [], [], None, None, "", grid=grid)
    page = grid_section(run, [run])
    lengths, speeds = page.split("</figure>")[:2]
    assert re.findall(r'class="cell"[^>]*>([\d.]+)', lengths) == ["2.00", "3.00", "4.00"]
    assert re.findall(r'class="cell"[^>]*>([\d.]+)', speeds) == ["1.00", "1.50", "2.00"]
    opacities = [float(value) for value in re.findall(r'fill-opacity="([\d.]+)"', lengths)]
    assert opacities == sorted(opacities) and opacities[0] < opacities[-1]
    places = [float(x) for x in re.findall(r'<rect class="heat" x="([\d.]+)"', lengths)]
    assert places[0] < places[1] < places[2], "columns are numbers of tokens"
    assert "3 x 1" in lengths and "3 x 4" in lengths and "a draft step 0.2" in speeds


def test_a_block_drafter_s_cells_are_numbers_of_its_tokens():
    cells = [cell(1, 1, 2, 1.5), cell(3, 1, 4, 2.0)]
    grid = {"draft_cost": 0.2, "verify_cost": 0.0, "drafts_blocks": True, "cells": cells}
    run = RunRecord(Path("run"), [], [], [], [], None, None, "", grid=grid)
    page = grid_section(run, [run])
    assert "Tokens drafted per block" in page and "a draft block 0.2" in page and "topk" not in page
    assert re.findall(r'class="cell"[^>]*>([\d.]+)', page.split("</figure>")[0]) == ["1.50", "2.00"]


def test_a_run_without_a_grid_has_no_section_and_a_damaged_file_is_an_error():
    run = RunRecord(Path("run"), [], [], [], [], None, None, "")
    assert grid_section(run, [run]) == ""
    broken = RunRecord(Path("run"), [], [], [], [], None, None, "", grid={"cells": [{}]})
    with pytest.raises(LookupError):
        grid_section(broken, [broken])
