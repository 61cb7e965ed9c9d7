"""Nothing but a door: Ray pickles by module, so nothing may live in `__main__`."""

from patchrank.tune.command import main

if __name__ == "__main__":
    main()
