"""`python -m longtake` and the `longtake` script."""

from longtake.cli import main

if __name__ == "__main__":
    main()
