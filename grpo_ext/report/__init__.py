"""The records of a run, and the reports made from them: plots, a page, comparisons, a model card, and Hub uploads."""
