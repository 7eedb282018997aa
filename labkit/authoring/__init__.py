"""What the authors of the workbook need, and its learners do not: no notebook imports this."""
