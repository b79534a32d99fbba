"""`python -m website`, with docs/ on the path, builds the site."""

import sys

from website.build import main

sys.exit(main())
