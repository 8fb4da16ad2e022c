"""An agent that analyses a table with scripts it wrote, each reading all of it into memory."""

from __future__ import annotations

from bench.agents.runner import Agent, work_dir

HEAD = "import csv, sys; rows = csv.DictReader(open('data/measured.csv'))\n"
COUNT = HEAD + "print(sum(1 for _ in rows))"
MEANS = (
    HEAD
    + """
by_place = {}
for row in rows:
    by_place.setdefault(row["where"], []).append(float(row["value"]))
for place, values in sorted(by_place.items())[:10]:
    print(place, len(values), sum(values) / len(values))
"""
)
SORT = (
    HEAD
    + """
table = list(rows)
table.sort(key=lambda row: float(row["value"]))
print(table[0], table[-1])
"""
)
SQL = (
    HEAD
    + """
import sqlite3
base = sqlite3.connect(":memory:")
base.execute("create table m (w integer, p text, v real, e real, n integer)")
base.executemany("insert into m values (?, ?, ?, ?, ?)", (tuple(row.values()) for row in rows))
base.execute("create index i on m (p, v)")
for row in base.execute("select p, count(*), avg(v) from m group by p order by 3 desc limit 5"):
    print(row)
"""
)
JSON = (
    HEAD
    + """
import json
text = json.dumps([dict(row) for row in rows])
open("data/measured.json", "w").write(text)
print(len(text), len(json.loads(text)))
"""
)


def main() -> None:
    """Analyse a table with scripts that each read all of it into memory."""
    agent = Agent("analyse", work_dir())
    agent.think(3)
    agent.bash("ls -la data; head -3 data/measured.csv; wc -l data/measured.csv")
    agent.think(3)
    agent.python(COUNT)
    agent.think(4)
    agent.python(MEANS)
    agent.think(5)
    agent.python(SORT)
    agent.think(4)
    agent.bash("cut -d, -f2 data/measured.csv | sort | uniq -c | sort -rn | head")
    agent.think(4)
    agent.python(SQL)
    agent.think(6)
    agent.python(JSON)
    agent.think(3)
    agent.bash("gzip -k data/measured.json && ls -la data; rm data/measured.json*")
    agent.think(3)
    agent.python(SORT)
    agent.think(2)


if __name__ == "__main__":
    main()
