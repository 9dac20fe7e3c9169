"""The command line: parse, call `compiler`, print, exit code."""
