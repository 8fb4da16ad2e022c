"""Print what this host can do: `python -m agentcgroupd.doctor`."""

import sys

from agentcgroupd.doctor.report import main

sys.exit(main())
