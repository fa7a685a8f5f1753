"""Run the command line as `python -m ipsecgate`."""

from ipsecgate.cli import main

if __name__ == "__main__":
    main()
