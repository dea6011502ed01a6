"""What a run records, and what is made of it: pictures, a page, comparisons, a model card, and uploads to the Hub."""
