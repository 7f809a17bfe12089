"""From a store of runs to one trustworthy comparison: cells, statistics, figures, report."""
