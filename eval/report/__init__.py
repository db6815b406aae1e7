"""What people look at: answers row by row, charts, the page, TensorBoard pictures, tables."""
