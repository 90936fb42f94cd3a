"""``python -m sparring``: what launchers of several processes start (``torchrun -m sparring train ...``)."""

from sparring.cli import main

if __name__ == "__main__":
    main(prog_name="sparring")
