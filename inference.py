"""`sheepop generate` under the name that the project's first users know."""

import sys

from sheepop.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
