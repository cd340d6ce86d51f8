"""Commands about runs, budgets and this machine. Nothing here changes a run."""
