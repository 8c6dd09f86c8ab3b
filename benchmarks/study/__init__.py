"""The study: six transfer tasks, every method, several seeds. See RESULTS.md beside this file."""
