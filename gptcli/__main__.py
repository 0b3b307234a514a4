"""`python -m gptcli` is the command `gpt`."""

from gptcli.cli.main import main

if __name__ == "__main__":
    main()
