"""The command line: arguments in, results on stdout, progress on stderr."""
