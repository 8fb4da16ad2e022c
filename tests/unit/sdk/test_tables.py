"""Columns line up, whatever is in them."""

from __future__ import annotations

import pytest

from agentcgroup.tables import aligned, table


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert aligned([("a", "bcd", "e"), ("fgh", "i", "")], right={1}) == ["a    bcd  e", "fgh    i"]
    assert aligned([]) == []


def test_a_table_has_headers_and_on_demand_a_rule() -> None:
    rows = [("s1", "12"), ("s2", "1234567")]
    assert table(["NAME", ">USED"], rows) == ["NAME     USED", "s1         12", "s2    1234567"]
    assert table(["NAME", ">USED"], rows, rule=True)[1] == "----  -------"
    assert table(["NAME"], []) == ["NAME"]


def test_a_row_with_too_few_cells_is_an_error() -> None:
    with pytest.raises(ValueError):
        table(["NAME", "USED"], [("s1",)])
