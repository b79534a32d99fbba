"""`python -m sheepop` is the same program as the console command."""

from sheepop.cli import main

if __name__ == "__main__":
    main()
