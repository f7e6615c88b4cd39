"""``python -m dfdask`` is ``dfdask``."""

from dfdask.cli import main

if __name__ == "__main__":
    main(prog_name="dfdask")
