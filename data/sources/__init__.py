"""Any dataset as rows: readers, columns, splits, folds."""
