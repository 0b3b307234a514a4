"""The command line. Importing it never imports torch: a command's body imports what it needs."""
