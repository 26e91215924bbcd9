"""Entry point of the command line. It imports nothing slow, so that Ctrl-C is handled from the beginning."""

from accel.cli.interrupts import one_line_exit
from accel.system.signals import interrupter


def main() -> None:
    """Run the console script `accel`.

    Exit with 0; 2 after a message that explains an error; 130 or 143 after Ctrl-C or SIGTERM.
    """
    with one_line_exit():
        with interrupter.at_once():
            from accel.cli import application

        application.main()


if __name__ == "__main__":
    main()
