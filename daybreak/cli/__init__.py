"""The command line: one small file per verb; main.py joins them and turns errors into exit codes. No torch here."""
